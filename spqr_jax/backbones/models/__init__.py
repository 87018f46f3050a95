"""Flax NNX models whose attribute names are the diffusers and transformers names.

Axis letters used in every docstring: B batch, H height, W width, C channels, L tokens, N heads, D head dimension.
Images and feature maps are NHWC here; NCHW exists only in `convert/`.
"""

from spqr_jax.backbones.models.clip_text import CLIPTextModel, CLIPTextModelWithProjection
from spqr_jax.backbones.models.clip_vision import CLIPVisionModelWithProjection
from spqr_jax.backbones.models.flux import FluxTransformer2DModel
from spqr_jax.backbones.models.sd3 import SD3Transformer2DModel
from spqr_jax.backbones.models.t5 import T5EncoderModel
from spqr_jax.backbones.models.unet import UNet2DConditionModel
from spqr_jax.backbones.models.vae import AutoencoderKL

__all__ = [
    "AutoencoderKL",
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "CLIPVisionModelWithProjection",
    "FluxTransformer2DModel",
    "SD3Transformer2DModel",
    "T5EncoderModel",
    "UNet2DConditionModel",
]
