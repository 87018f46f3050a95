"""Stable Diffusion 3 and 3.5: a flow transformer that reads the states of two CLIP encoders and of T5.

The text states are those of the CLIPs side by side, filled with zeros up to T5's width, and T5's behind them. Without
T5 its part is zeros, as in diffusers.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax.backbones import base, text
from spqr_jax.backbones.base import Array, Condition, Lengths, Regions
from spqr_jax.backbones.noising import SD3_FLOW
from spqr_jax.backbones.stable_diffusion import STABLE_DIFFUSION
from spqr_jax.pipeline import Pipeline
from spqr_jax.schedulers import Spacing

LENGTHS = Lengths(usual=256, most=512)  # tokens for T5, as in diffusers' pipeline

# Joint attention has no layers that only read the text, as a UNet's attn2 does. What carries the text into the image
# are the keys and values that text tokens offer to image tokens (add_k_proj, add_v_proj), and the output that carries
# them on to the next block (to_add_out): the counterparts of attn2's to_k, to_v and to_out, which "moderate" trains in
# a UNet. add_q_proj decides what text tokens read, so it is no part, as to_q is none there.
# Every key and value of the text reads the text states through context_embedder, and UCE's authors edit that kernel and
# the first of the pooled state in FLUX (uce_flux_edit.py). ESD's authors train the linear layers of attention there.
REGIONS = Regions(
    key_value=re.compile(r"^context_embedder\.kernel$"),
    pooled=re.compile(r"^time_text_embed\.text_embedder\.linear_1\.kernel$"),
    cross_attention=re.compile(r"^transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)\."),
    cross_attention_projections=re.compile(
        r"^transformer_blocks\.\d+\.attn\.(add_k_proj|add_v_proj|to_add_out)\.(kernel|bias)$"
    ),
    lora=re.compile(r"^transformer_blocks\.\d+\.attn2?\.(to_q|to_k|to_v|to_out\.0)\.kernel$"),
    lora_text=re.compile(r"^transformer_blocks\.\d+\.attn\.(add_[qkv]_proj|to_add_out)\.kernel$"),
    frame=re.compile(r"^(pos_embed|time_text_embed|context_embedder|norm_out|proj_out)\."),
    buffers=re.compile(r"^pos_embed\.pos_embed$"),
)


def condition(
    pipeline: Pipeline, texts: Sequence[str], size: tuple[int, int], unconditional: Sequence[int] = ()
) -> Condition:
    """Text states [N, 77 + T5's length, E] and the projected pooled states of both CLIPs side by side.

    An empty text is encoded like any other. The size has no effect.
    """
    del size, unconditional
    first, second = (text.encode(pipeline, texts, encoder=name, penultimate=True) for name in CLIPS)
    states = t5_states(pipeline, texts)
    clip = jnp.concatenate([first.hidden, second.hidden], axis=-1)
    clip = jnp.pad(clip, ((0, 0), (0, 0), (0, states.shape[-1] - clip.shape[-1])))
    assert first.embeds is not None and second.embeds is not None  # both encoders have projections
    pooled = jnp.concatenate([first.embeds, second.embeds], axis=-1)
    return Condition(jnp.concatenate([clip, states.astype(clip.dtype)], axis=1), pooled)


CLIPS = ("text_encoder", "text_encoder_2")
T5 = "text_encoder_3"


def t5_states(pipeline: Pipeline, texts: Sequence[str]) -> jax.Array:
    """T5's last states [N, L, E], or zeros without T5."""
    length = LENGTHS.usual if pipeline.text_length is None else pipeline.text_length
    if T5 in pipeline.params:
        return text.encode(pipeline, texts, encoder=T5, length=length).hidden
    return jnp.zeros((len(texts), length, pipeline.configs["transformer"]["joint_attention_dim"]))


def last_words(pipeline: Pipeline, text: str) -> tuple[int, ...]:
    """The text's last word under CLIP, and under T5 if there is T5; the first position where it has none."""
    found = base.last_words(pipeline, text)
    if T5 not in pipeline.params:
        return found
    ids = pipeline.tokenizers["tokenizer_3"](text).input_ids  # words, then the end of text
    return *found, pipeline.configs["text_encoder"]["max_position_embeddings"] + max(len(ids) - 2, 0)


def predict(model: Any, latents: Array, times: Array, condition: Condition) -> jax.Array:
    """One call of the transformer."""
    return model(latents, times, condition.context, condition.pooled)


def side(pipeline: Pipeline) -> int:
    """The side in pixels that the transformer was trained at."""
    return int(pipeline.configs["transformer"]["sample_size"]) * SD3.factor(pipeline)


def patch(pipeline: Pipeline) -> int:
    """Latents per image token along one side."""
    return int(pipeline.configs["transformer"]["patch_size"])


def spacing(pipeline: Pipeline, size: tuple[int, int]) -> Spacing:
    """The image tokens of an image of `size` pixels."""
    pixels = SD3.multiple(pipeline)
    return Spacing((size[0] // pixels) * (size[1] // pixels))


def latent_shape(pipeline: Pipeline, size: tuple[int, int]) -> tuple[int, int, int]:
    """(h, w, C)."""
    factor = SD3.factor(pipeline)
    return size[0] // factor, size[1] // factor, pipeline.configs["transformer"]["in_channels"]


def scaling(pipeline: Pipeline) -> tuple[float, float]:
    """The VAE's `scaling_factor` and `shift_factor`."""
    config = pipeline.configs["vae"]
    return float(config["scaling_factor"]), float(config.get("shift_factor") or 0)


def scaled(mean: np.ndarray, logvar: np.ndarray, scaling: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the shifted and scaled latents, float32."""
    scale, shift = map(np.float32, scaling)
    return (mean - shift) * scale, np.exp(0.5 * logvar) * scale


def decode(model: Any, latents: jax.Array, scaling: tuple[float, float]) -> jax.Array:
    """Shifted and scaled latents -> pixels, float32 in -1..1."""
    scale, shift = scaling
    return model.decode(latents / scale + shift).astype(jnp.float32)


SD3 = STABLE_DIFFUSION._replace(
    key="sd3",
    name="Stable Diffusion 3 or 3.5",
    pipeline_class="StableDiffusion3Pipeline",
    components=("transformer", "vae", *CLIPS, T5),
    optional=(T5,),
    denoiser="transformer",
    denoiser_class="SD3Transformer2DModel",
    noising=SD3_FLOW,
    regions=REGIONS,
    condition=condition,
    predict=predict,
    side=side,
    patch=patch,
    spacing=spacing,
    latent_shape=latent_shape,
    scaling=scaling,
    scaled=scaled,
    decode=decode,
    text=None,
    sampler="flow_euler",
    last_words=last_words,
    lengths=LENGTHS,
)
