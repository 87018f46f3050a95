"""AutoencoderKL: images in [-1, 1] <-> latents, as in diffusers' module of the same name."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from spqr_jax.backbones.models.layers import Conv, Downsample2D, GroupNorm, ResnetBlock2D, Upsample2D
from spqr_jax.backbones.models.unet import Attention

DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
EPS = 1e-6


class VAEAttention(Attention):
    """Single-head self-attention over all pixels of x [B, H, W, C], with its own GroupNorm and biases everywhere."""

    def __init__(self, channels: int, groups: int, *, rngs: nnx.Rngs):
        super().__init__(channels, 1, qkv_bias=True, rngs=rngs)
        self.group_norm = GroupNorm(groups, channels, eps=EPS, rngs=rngs)

    def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
        h = self.group_norm(x).reshape(x.shape[0], -1, x.shape[-1])
        return x + super().__call__(h, context).reshape(x.shape)


class MidBlock(nnx.Module):
    def __init__(self, channels: int, groups: int, *, add_attention: bool, rngs: nnx.Rngs):
        self.resnets = nnx.List([_resnet(channels, channels, groups, rngs) for _ in range(2)])
        self.attentions = nnx.List([VAEAttention(channels, groups, rngs=rngs)] if add_attention else [])

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


def _resnet(cin: int, cout: int, groups: int, rngs: nnx.Rngs) -> ResnetBlock2D:
    return ResnetBlock2D(cin, cout, groups=groups, eps=EPS, rngs=rngs)


class DownEncoderBlock2D(nnx.Module):
    def __init__(self, cin: int, cout: int, layers: int, groups: int, *, add_downsample: bool, rngs: nnx.Rngs):
        self.resnets = nnx.List([_resnet(cin if i == 0 else cout, cout, groups, rngs) for i in range(layers)])
        padding = ((0, 1), (0, 1))
        self.downsamplers = nnx.List([Downsample2D(cout, padding=padding, rngs=rngs)] if add_downsample else [])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in [*self.resnets, *self.downsamplers]:
            x = layer(x)
        return x


class UpDecoderBlock2D(nnx.Module):
    def __init__(self, cin: int, cout: int, layers: int, groups: int, *, add_upsample: bool, rngs: nnx.Rngs):
        self.resnets = nnx.List([_resnet(cin if i == 0 else cout, cout, groups, rngs) for i in range(layers)])
        self.upsamplers = nnx.List([Upsample2D(cout, rngs=rngs)] if add_upsample else [])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in [*self.resnets, *self.upsamplers]:
            x = layer(x)
        return x


class Encoder(nnx.Module):
    def __init__(self, c: dict[str, Any], *, rngs: nnx.Rngs):
        channels, groups = list(c["block_out_channels"]), c["norm_num_groups"]
        self.conv_in = Conv(c["in_channels"], channels[0], rngs=rngs)
        self.down_blocks = nnx.List(
            [
                DownEncoderBlock2D(
                    channels[max(i - 1, 0)],
                    channels[i],
                    c["layers_per_block"],
                    groups,
                    add_downsample=i < len(channels) - 1,
                    rngs=rngs,
                )
                for i in range(len(channels))
            ]
        )
        self.mid_block = MidBlock(channels[-1], groups, add_attention=c["mid_block_add_attention"], rngs=rngs)
        self.conv_norm_out = GroupNorm(groups, channels[-1], eps=EPS, rngs=rngs)
        self.conv_out = Conv(channels[-1], 2 * c["latent_channels"], rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class Decoder(nnx.Module):
    def __init__(self, c: dict[str, Any], *, rngs: nnx.Rngs):
        channels, groups = list(c["block_out_channels"])[::-1], c["norm_num_groups"]
        self.conv_in = Conv(c["latent_channels"], channels[0], rngs=rngs)
        self.mid_block = MidBlock(channels[0], groups, add_attention=c["mid_block_add_attention"], rngs=rngs)
        self.up_blocks = nnx.List(
            [
                UpDecoderBlock2D(
                    channels[max(i - 1, 0)],
                    channels[i],
                    c["layers_per_block"] + 1,
                    groups,
                    add_upsample=i < len(channels) - 1,
                    rngs=rngs,
                )
                for i in range(len(channels))
            ]
        )
        self.conv_norm_out = GroupNorm(groups, channels[-1], eps=EPS, rngs=rngs)
        self.conv_out = Conv(channels[-1], c["out_channels"], rngs=rngs)

    def __call__(self, z: jax.Array) -> jax.Array:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
    """`encode` [B, H, W, 3] in [-1, 1] -> (mean, log-variance), each [B, H/f, W/f, C]; `decode` goes back.

    These latents are the VAE's own. The denoiser sees them scaled, and for SD3 and FLUX shifted too, which is the
    backbone's knowledge. The log-variance is clipped to [-30, 20], as in diffusers.
    """

    def __init__(self, config: dict[str, Any], *, rngs: nnx.Rngs):
        if config.get("act_fn", "silu") != "silu":
            raise ValueError("VAE config: activations other than silu are not supported.")
        c = DEFAULTS | {k: v for k, v in config.items() if k in DEFAULTS}
        latent = c["latent_channels"]
        self.encoder = Encoder(c, rngs=rngs)
        self.decoder = Decoder(c, rngs=rngs)
        self.quant_conv = (
            Conv(2 * latent, 2 * latent, 1, padding=0, rngs=rngs) if c["use_quant_conv"] else nnx.data(None)
        )
        self.post_quant_conv = (
            Conv(latent, latent, 1, padding=0, rngs=rngs) if c["use_post_quant_conv"] else nnx.data(None)
        )

    def encode(self, images_pm1: jax.Array) -> tuple[jax.Array, jax.Array]:
        moments = self.encoder(images_pm1.astype(self.encoder.conv_in.kernel.dtype))
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, latents: jax.Array) -> jax.Array:
        latents = latents.astype(self.decoder.conv_in.kernel.dtype)
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents)
