"""FLUX.1: a flow transformer that reads T5's text states and CLIP's pooled state.

"dev" is distilled with guidance: it reads the scale, and one prediction serves. "schnell" is distilled without: it has
no guidance at all.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from spqr_jax.backbones import text
from spqr_jax.backbones.base import Array, Condition, Lengths
from spqr_jax.backbones.noising import FLUX_FLOW
from spqr_jax.backbones.sd3 import REGIONS as SD3_REGIONS
from spqr_jax.backbones.sd3 import SD3
from spqr_jax.pipeline import Pipeline
from spqr_jax.schedulers import Spacing

PATCH = 2  # latents along each side of a token
SAMPLE_SIZE = 128  # latents along one side of the images that FLUX.1 is sampled at; its config does not say
LENGTHS = Lengths(usual=512, most=512)  # tokens for T5, as in diffusers' pipeline
LENGTH_OF_SCHNELL = 256  # the most that it was trained with
TRAINED_GUIDANCE = 1.0  # what dev reads in training, as in diffusers' scripts

# Joint attention has no layers that read the text alone, as a UNet's attn2 does. In double blocks the text has weights
# of its own, as in SD3, so "moderate" trains the same of them. In a single block one projection serves the tokens of
# text and image, so that nothing carries the text alone: these blocks leave "moderate" nothing to train. ESD's authors
# train the linear layers of attention in both kinds of block.
REGIONS = SD3_REGIONS._replace(
    cross_attention=re.compile(
        r"^(single_)?transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)\."
    ),
    lora=re.compile(r"^(single_)?transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)\.kernel$"),
    frame=re.compile(r"^(time_text_embed|context_embedder|x_embedder|norm_out|proj_out)\."),
    buffers=None,
)

# Kernels that make queries and keys of text tokens: what the tokens look for, and how they are found.
TEXT_ATTENTION = re.compile(r"^transformer_blocks\.\d+\.attn\.add_[qk]_proj\.kernel$")


def distilled(pipeline: Pipeline) -> bool:
    """Whether the denoiser reads a scale of guidance (dev), or has no guidance (schnell)."""
    return bool(pipeline.configs["transformer"].get("guidance_embeds", False))


def condition(
    pipeline: Pipeline, texts: Sequence[str], size: tuple[int, int], unconditional: Sequence[int] = ()
) -> Condition:
    """T5's last hidden states [N, L, E], CLIP's pooled states [N, P], and for dev the scale of guidance of training.

    L is `Pipeline.text_length`, default 512 for dev and 256 for schnell. Padding is read like any token, as in
    diffusers. The size has no effect. Raises ValueError for more tokens than schnell was trained with.
    """
    del size, unconditional
    longest = LENGTHS.most if distilled(pipeline) else LENGTH_OF_SCHNELL
    length = longest if pipeline.text_length is None else pipeline.text_length
    if length > longest:
        raise ValueError(f"{pipeline.name}: FLUX.1 schnell reads at most {longest} tokens of a text, found {length}.")
    states = text.encode(pipeline, texts, encoder="text_encoder_2", length=length).hidden
    pooled = text.encode(pipeline, texts, pooled=True).embeds
    scales = np.full(len(texts), TRAINED_GUIDANCE, np.float32) if distilled(pipeline) else None
    return Condition(states, pooled, guidance=scales)


def last_words(pipeline: Pipeline, text: str) -> tuple[int, ...]:
    """The text's last word under T5; the first position where it has none."""
    ids = pipeline.tokenizers["tokenizer_2"](text).input_ids  # words, then the end of text
    return (max(len(ids) - 2, 0),)


def guidance(pipeline: Pipeline, scales: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
    """dev reads the scales, and there is no classifier-free guidance. Raises ValueError for guidance of schnell."""
    if distilled(pipeline):
        return scales, np.ones_like(scales)
    if (scales > 1).any():
        raise ValueError(
            f"{pipeline.name}: FLUX.1 schnell is distilled without guidance, found {scales.max():g}; set guidance=0."
        )
    return None, np.ones_like(scales)


def predict(model: Any, latents: Array, times: Array, condition: Condition) -> jax.Array:
    """One call of the transformer."""
    return model(latents, times, condition.context, condition.pooled, condition.guidance)


def predict_and_attend(model: Any, latents: Array, times: Array, condition: Condition) -> tuple[jax.Array, jax.Array]:
    """As `predict`, with the attention of the last double block, float32 [B, heads, L, L], the text's tokens first."""
    return model.predicted_and_attended(latents, times, condition.context, condition.pooled, condition.guidance)


def side(pipeline: Pipeline) -> int:
    """The side in pixels that FLUX.1 is sampled at."""
    return int(pipeline.configs["transformer"].get("sample_size", SAMPLE_SIZE)) * SD3.factor(pipeline)


def latent_shape(pipeline: Pipeline, size: tuple[int, int]) -> tuple[int, int, int]:
    """(h, w, C)."""
    channels = pipeline.configs["transformer"].get("in_channels", 64) // PATCH**2
    return size[0] // SD3.factor(pipeline), size[1] // SD3.factor(pipeline), channels


def spacing(pipeline: Pipeline, size: tuple[int, int]) -> Spacing:
    """The image tokens, and levels that run down to 1/n before the shift, as in diffusers' pipeline."""
    height, width, _ = latent_shape(pipeline, size)
    return Spacing(height * width // PATCH**2, by_steps=True)


FLUX = SD3._replace(
    key="flux",
    name="FLUX.1",
    pipeline_class="FluxPipeline",
    components=("transformer", "vae", "text_encoder", "text_encoder_2"),
    optional=(),
    denoiser_class="FluxTransformer2DModel",
    noising=FLUX_FLOW,
    regions=REGIONS,
    condition=condition,
    predict=predict,
    side=side,
    patch=lambda _: PATCH,
    spacing=spacing,
    latent_shape=latent_shape,
    last_words=last_words,
    lengths=LENGTHS,
    guidance=guidance,
)
