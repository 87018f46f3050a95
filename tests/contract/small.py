"""A small pipeline of every backbone, random weights drawn with NumPy.

`pipeline` has the real models (`spqr_jax.methods.contract.tiny`). `quick` has the real text encoders, and beside them
models that compile in a moment: a UNet of one transformer, which has a weight in every region (SD3, FLUX: their
transformers), and a codec without weights.
"""

from typing import Any

import jax
from flax import nnx

from spqr_jax import params as params_lib
from spqr_jax.backbones.models.layers import Conv, GroupNorm, timestep_embedding
from spqr_jax.backbones.models.unet import TimestepEmbedding, Transformer2DModel
from spqr_jax.methods.contract.tiny import CHANNELS, FACTOR, GROUPS, HEADS, LENGTH, SIDE, configs, pipeline
from spqr_jax.pipeline import Pipeline
from tests import stand_in

__all__ = ["FACTOR", "LENGTH", "SIDE", "configs", "pipeline", "quick"]


def quick(key: str) -> Pipeline:
    """As `pipeline`, with a UNet and a VAE that compile in a moment. Transformers do as they are."""
    if "unet" not in configs(key):
        return pipeline(key, vae=(stand_in.Codec(), {}))
    unet = params_lib.skeleton(lambda: QuickUNet(configs(key)["unet"], rngs=nnx.Rngs(0)))
    return pipeline(key, unet=unet, vae=(stand_in.Codec(), {}))


class Empty(nnx.Module):
    """A block without weights, so that the ones after it have the numbers that they have in a whole UNet."""


class Block(nnx.Module):
    def __init__(self, transformer: nnx.Module):
        self.attentions = nnx.List([Empty(), transformer])


class QuickUNet(nnx.Module):
    """The beginning and the end of a UNet, with its layer up_blocks.1.attentions.1 between them."""

    def __init__(self, config: dict[str, Any], *, rngs: nnx.Rngs):
        self.conv_in = Conv(4, CHANNELS, 1, padding=0, rngs=rngs)
        self.time_embedding = TimestepEmbedding(CHANNELS, CHANNELS, rngs=rngs)
        context = config["cross_attention_dim"]
        layer = Transformer2DModel(CHANNELS, HEADS, context, 1, linear=True, groups=GROUPS, rngs=rngs)
        self.up_blocks = nnx.List([Empty(), Block(layer)])
        self.conv_norm_out = GroupNorm(GROUPS, CHANNELS, eps=1e-5, rngs=rngs)
        self.conv_out = Conv(CHANNELS, 4, 1, padding=0, rngs=rngs)

    def __call__(self, latents, timesteps, context, text_embeds=None, time_ids=None):
        time = timestep_embedding(timesteps, CHANNELS, flip_sin_to_cos=True, freq_shift=0)
        if text_embeds is not None:
            time = time + text_embeds + time_ids.sum(-1, keepdims=True) / 1000
        x = self.conv_in(latents) + self.time_embedding(time)[:, None, None]
        x = self.up_blocks[1].attentions[1](x, context)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))
