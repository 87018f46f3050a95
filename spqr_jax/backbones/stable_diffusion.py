"""Stable Diffusion 1.x and 2.x: a UNet that reads the text states of one CLIP encoder."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax.backbones import text
from spqr_jax.backbones.base import Array, Backbone, Condition, Regions, TextEncoding
from spqr_jax.backbones.noising import DDPM
from spqr_jax.pipeline import Pipeline

# Parts of diffusers' UNet2DConditionModel. SDXL has the same.
UNET_REGIONS = Regions(
    key_value=re.compile(r"\.attn2\.to_[kv]\.kernel$"),
    cross_attention=re.compile(r"(^|\.)attn2\."),
    cross_attention_projections=re.compile(r"\.attn2\.(to_k|to_v|to_out\.0)\.(kernel|bias)$"),
    lora=re.compile(r"\.attn[12]\.(to_q|to_k|to_v|to_out\.0)\.kernel$"),
    frame=re.compile(r"(^|\.)(time_embedding|add_embedding)\.|^(conv_norm_out|conv_out)\."),
    # 192 kernels in SD1.x and SD2.x.
    transformer=re.compile(
        r"\.attentions\.\d+\.(proj_in|proj_out|transformer_blocks\.\d+\."
        r"(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2)))\.kernel$"
    ),
    # CompVis' output_blocks.4 and .7: self-attention in the middle of the second and third up blocks.
    reset=re.compile(r"^up_blocks\.[12]\.attentions\.1\..*\.attn1\."),
)

# The attention of CLIP's text encoder, as diffusers' LoRA scripts adapt it with --train_text_encoder.
TEXT_LORA = re.compile(r"\.self_attn\.(q_proj|k_proj|v_proj|out_proj)\.kernel$")


def condition(
    pipeline: Pipeline, texts: Sequence[str], size: tuple[int, int], unconditional: Sequence[int] = ()
) -> Condition:
    """The encoder's last hidden states. An empty text is encoded like any other. The size has no effect."""
    del size, unconditional
    return Condition(text.encode(pipeline, texts).hidden)


def resized(condition: Condition, size: tuple[int, int]) -> Condition:
    """The condition itself, since the UNet does not read sizes."""
    del size
    return condition


def cropped(condition: Condition, geometry: np.ndarray) -> Condition:
    """The condition itself, since the UNet does not read sizes."""
    del geometry
    return condition


def states(encoders: list[Any], ids: Array) -> tuple[jax.Array, None]:
    """The encoder's last hidden states, as `condition` has them."""
    (encoder,) = encoders
    return encoder(ids[:, 0]).last_hidden_state, None


def predict(model: Any, latents: Array, times: Array, condition: Condition) -> jax.Array:
    """One call of the UNet."""
    return model(latents, times, condition.context, condition.pooled, condition.time_ids)


def factor(pipeline: Pipeline) -> int:
    """Pixels per latent along one side."""
    return 2 ** (len(pipeline.configs["vae"]["block_out_channels"]) - 1)


def side(pipeline: Pipeline) -> int:
    """The side in pixels that the UNet was trained at."""
    return int(pipeline.configs["unet"]["sample_size"]) * factor(pipeline)


def latent_shape(pipeline: Pipeline, size: tuple[int, int]) -> tuple[int, int, int]:
    """(h, w, C)."""
    return size[0] // factor(pipeline), size[1] // factor(pipeline), pipeline.configs["unet"]["in_channels"]


def scaling(pipeline: Pipeline) -> float:
    """The VAE's `scaling_factor`. Raises ValueError for a VAE that also shifts latents, as no UNet's does."""
    if pipeline.configs["vae"].get("shift_factor") is not None:
        raise ValueError(f"{pipeline.name}: VAE config: shift_factor is not supported; a UNet's VAE does not shift.")
    return float(pipeline.configs["vae"].get("scaling_factor", 0.18215))


def encode(model: Any, images_u8: Array) -> tuple[jax.Array, jax.Array]:
    """Mean and log-variance of the VAE's own latents, before scaling."""
    return model.encode(images_u8.astype(jnp.float32) / 127.5 - 1)


def scaled(mean: np.ndarray, logvar: np.ndarray, scaling: float) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the scaled latents, float32."""
    return mean * np.float32(scaling), np.exp(0.5 * logvar) * np.float32(scaling)


def decode(model: Any, latents: jax.Array, scaling: float) -> jax.Array:
    """Scaled latents -> pixels, float32 in -1..1."""
    return model.decode(latents / scaling).astype(jnp.float32)


STABLE_DIFFUSION = Backbone(
    key="sd",
    name="Stable Diffusion 1.x or 2.x",
    pipeline_class="StableDiffusionPipeline",
    components=("unet", "vae", "text_encoder"),
    denoiser="unet",
    autoencoder="vae",
    noising=DDPM,
    regions=UNET_REGIONS,
    condition=condition,
    resized=resized,
    cropped=cropped,
    predict=predict,
    factor=factor,
    side=side,
    latent_shape=latent_shape,
    scaling=scaling,
    encode=encode,
    scaled=scaled,
    decode=decode,
    text=TextEncoding(("text_encoder",), TEXT_LORA, states),
)
