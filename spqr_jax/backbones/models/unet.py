"""UNet2DConditionModel of Stable Diffusion 1.x, 2.x and XL.

Follows diffusers' module of the same name, with its attribute names and config fields. Fields that no Stable Diffusion
checkpoint uses are refused by name instead of being ignored.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from spqr_jax.backbones.models.attention import attention
from spqr_jax.backbones.models.layers import (
    Conv,
    Downsample2D,
    GroupNorm,
    Identity,
    LayerNorm,
    Linear,
    ResnetBlock2D,
    TimestepEmbedding,
    Upsample2D,
    timestep_embedding,
)
from spqr_jax.backbones.models.remat import layer
from spqr_jax.devices.target import CPU

DEFAULTS: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "attention_head_dim": 8,
    "num_attention_heads": None,
    "use_linear_projection": False,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
}
# What diffusers offers and Stable Diffusion leaves at this value; anything else is refused.
FIXED: dict[str, Any] = {
    "center_input_sample": False,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "only_cross_attention": False,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "dropout": 0.0,
    "act_fn": "silu",
    "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "dual_cross_attention": False,
    "class_embed_type": None,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "mid_block_only_cross_attention": None,
    "cross_attention_norm": None,
}


def _checked(config: dict[str, Any]) -> dict[str, Any]:
    for field, value in FIXED.items():
        # `None` is how older files write a default.
        if config.get(field) is not None and config[field] != value:
            raise ValueError(f"UNet config: {field}={config[field]!r} is not supported (expected {value!r}).")
    if config.get("addition_embed_type") not in (None, "text_time"):
        raise ValueError(f"UNet config: addition_embed_type={config['addition_embed_type']!r} is not supported.")
    return DEFAULTS | {k: v for k, v in config.items() if k in DEFAULTS}


def _per_block(value, blocks: int) -> list:
    return list(value) if isinstance(value, (list, tuple)) else [value] * blocks


class GEGLU(nnx.Module):
    def __init__(self, din: int, dout: int, *, rngs: nnx.Rngs):
        self.proj = Linear(din, 2 * dout, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden, gate = jnp.split(self.proj(x), 2, axis=-1)
        return hidden * jax.nn.gelu(gate, approximate=False)


class FeedForward(nnx.Module):
    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.net = nnx.List([GEGLU(dim, 4 * dim, rngs=rngs), Identity(), Linear(4 * dim, dim, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for part in self.net:
            x = part(x)
        return x


class Attention(nnx.Module):
    """x [B, L, C] attends to `context` [B, M, E] (itself when None) -> [B, L, C]."""

    def __init__(self, dim: int, heads: int, *, context_dim: int | None = None, qkv_bias: bool = False, rngs: nnx.Rngs):
        context_dim = context_dim or dim
        self.to_q = Linear(dim, dim, use_bias=qkv_bias, rngs=rngs)
        self.to_k = Linear(context_dim, dim, use_bias=qkv_bias, rngs=rngs)
        self.to_v = Linear(context_dim, dim, use_bias=qkv_bias, rngs=rngs)
        self.to_out = nnx.List([Linear(dim, dim, rngs=rngs)])
        self.heads = heads
        self.target = CPU

    def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (t.reshape(*t.shape[:2], self.heads, -1) for t in (q, k, v))
        return self.to_out[0](attention(q, k, v, target=self.target).reshape(x.shape))


class BasicTransformerBlock(nnx.Module):
    def __init__(self, dim: int, heads: int, context_dim: int, *, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(dim, rngs=rngs)
        self.attn1 = Attention(dim, heads, rngs=rngs)
        self.norm2 = LayerNorm(dim, rngs=rngs)
        self.attn2 = Attention(dim, heads, context_dim=context_dim, rngs=rngs)
        self.norm3 = LayerNorm(dim, rngs=rngs)
        self.ff = FeedForward(dim, rngs=rngs)

    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nnx.Module):
    """x [B, H, W, C] with context [B, M, E] -> [B, H, W, C]. proj_in, proj_out: 1x1 convolutions (SD1) or linear."""

    def __init__(
        self, dim: int, heads: int, context_dim: int, depth: int, *, linear: bool, groups: int, rngs: nnx.Rngs
    ):
        self.norm = GroupNorm(groups, dim, eps=1e-6, rngs=rngs)
        self.proj_in = Linear(dim, dim, rngs=rngs) if linear else Conv(dim, dim, 1, padding=0, rngs=rngs)
        self.transformer_blocks = nnx.List(
            [BasicTransformerBlock(dim, heads, context_dim, rngs=rngs) for _ in range(depth)]
        )
        self.proj_out = Linear(dim, dim, rngs=rngs) if linear else Conv(dim, dim, 1, padding=0, rngs=rngs)

    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        # On the last axis a 1x1 convolution and a linear layer are the same product, so the order of
        # reshape and projection, in which diffusers' two variants differ, does not matter here.
        h = self.proj_in(self.norm(x)).reshape(x.shape[0], -1, x.shape[-1])
        for block in self.transformer_blocks:
            h = layer(block, h, context)
        return x + self.proj_out(h.reshape(x.shape))


class DownBlock2D(nnx.Module):
    """DownBlock2D, or CrossAttnDownBlock2D if `transformer` (a factory) is given. Returns the output and the skips."""

    def __init__(self, cin: int, cout: int, layers: int, *, add_downsample: bool, transformer, resnet, rngs: nnx.Rngs):
        self.resnets = nnx.List([resnet(cin if i == 0 else cout, cout) for i in range(layers)])
        self.attentions = nnx.List([transformer() for _ in range(layers)] if transformer else [])
        self.downsamplers = nnx.List([Downsample2D(cout, padding=1, rngs=rngs)] if add_downsample else [])

    def __call__(self, x: jax.Array, temb: jax.Array, context: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = layer(resnet, x, temb)
            if self.attentions:
                x = self.attentions[i](x, context)
            skips.append(x)
        for downsampler in self.downsamplers:
            x = downsampler(x)
            skips.append(x)
        return x, skips


class UNetMidBlock2DCrossAttn(nnx.Module):
    def __init__(self, channels: int, *, transformer, resnet):
        self.attentions = nnx.List([transformer()])
        self.resnets = nnx.List([resnet(channels, channels), resnet(channels, channels)])

    def __call__(self, x: jax.Array, temb: jax.Array, context: jax.Array) -> jax.Array:
        x = layer(self.resnets[0], x, temb)
        return layer(self.resnets[1], self.attentions[0](x, context), temb)


class UpBlock2D(nnx.Module):
    """UpBlock2D, or CrossAttnUpBlock2D if `transformer` (a factory) is given. Each resnet takes one skip."""

    def __init__(
        self, cin: int, cout: int, skips: list[int], *, add_upsample: bool, transformer, resnet, rngs: nnx.Rngs
    ):
        self.resnets = nnx.List([resnet((cin if i == 0 else cout) + skip, cout) for i, skip in enumerate(skips)])
        self.attentions = nnx.List([transformer() for _ in skips] if transformer else [])
        self.upsamplers = nnx.List([Upsample2D(cout, rngs=rngs)] if add_upsample else [])

    def __call__(self, x, temb, context, skips: list[jax.Array]) -> jax.Array:
        for i, resnet in enumerate(self.resnets):
            x = layer(resnet, jnp.concatenate([x, skips.pop()], axis=-1), temb)
            if self.attentions:
                x = self.attentions[i](x, context)
        for upsampler in self.upsamplers:
            # Odd sizes: the next skip says how large the image was before it was halved.
            x = upsampler(x, skips[-1].shape[1:3])
        return x


class UNet2DConditionModel(nnx.Module):
    """Predicts noise or velocity.

    A call takes latents [B, H, W, C], timesteps [B] (0..num_train_timesteps-1) and text states `context` [B, M, E]; for
    SDXL also `text_embeds` [B, P] (pooled states) and `time_ids` [B, 6] (sizes and crops in pixels). It returns
    [B, H, W, C].
    Raises ValueError for a config field that is not supported.
    """

    def __init__(self, config: dict[str, Any], *, rngs: nnx.Rngs):
        c = _checked(config)
        channels = list(c["block_out_channels"])
        n = len(channels)
        temb = 4 * channels[0]
        groups = c["norm_num_groups"]
        # diffusers' `attention_head_dim` is the number of heads, by a naming error kept for compatibility.
        heads = _per_block(c["num_attention_heads"] or c["attention_head_dim"], n)
        depths = _per_block(c["transformer_layers_per_block"], n)
        layers = _per_block(c["layers_per_block"], n)

        def resnet(cin, cout):
            return ResnetBlock2D(cin, cout, temb_channels=temb, groups=groups, eps=c["norm_eps"], rngs=rngs)

        def transformer(block):
            def make():
                return Transformer2DModel(
                    channels[block],
                    heads[block],
                    c["cross_attention_dim"],
                    depths[block],
                    linear=c["use_linear_projection"],
                    groups=groups,
                    rngs=rngs,
                )

            return make

        self.conv_in = Conv(c["in_channels"], channels[0], rngs=rngs)
        self.time_embedding = TimestepEmbedding(channels[0], temb, rngs=rngs)
        self.add_embedding = nnx.data(None)
        if c["addition_embed_type"] == "text_time":
            self.add_embedding = TimestepEmbedding(c["projection_class_embeddings_input_dim"], temb, rngs=rngs)

        down, skips = [], [channels[0]]
        for i, kind in enumerate(c["down_block_types"]):
            make = _transformer_for(kind, "Down", transformer(i))
            last = i == n - 1
            cin = channels[max(i - 1, 0)]
            down.append(
                DownBlock2D(
                    cin, channels[i], layers[i], add_downsample=not last, transformer=make, resnet=resnet, rngs=rngs
                )
            )
            skips += [channels[i]] * (layers[i] + (not last))
        self.down_blocks = nnx.List(down)
        self.mid_block = UNetMidBlock2DCrossAttn(channels[-1], transformer=transformer(n - 1), resnet=resnet)

        up, cin = [], channels[-1]
        for i, kind in enumerate(c["up_block_types"]):
            block = n - 1 - i
            make = _transformer_for(kind, "Up", transformer(block))
            taken = [skips.pop() for _ in range(layers[block] + 1)]
            up.append(
                UpBlock2D(
                    cin, channels[block], taken, add_upsample=block > 0, transformer=make, resnet=resnet, rngs=rngs
                )
            )
            cin = channels[block]
        self.up_blocks = nnx.List(up)
        self.conv_norm_out = GroupNorm(groups, channels[0], eps=c["norm_eps"], rngs=rngs)
        self.conv_out = Conv(channels[0], c["out_channels"], rngs=rngs)
        self.freq_dim, self.add_dim = channels[0], c["addition_time_embed_dim"]
        self.flip, self.shift = c["flip_sin_to_cos"], c["freq_shift"]

    def __call__(self, latents, timesteps, context, text_embeds=None, time_ids=None) -> jax.Array:
        dtype = self.conv_in.kernel.dtype
        latents, context = latents.astype(dtype), context.astype(dtype)
        temb = self.time_embedding(self.sinusoid(timesteps, self.freq_dim).astype(dtype))
        if self.add_embedding is not None:
            ids = self.sinusoid(time_ids.reshape(-1), self.add_dim).reshape(time_ids.shape[0], -1)
            temb = temb + self.add_embedding(jnp.concatenate([text_embeds.astype(dtype), ids.astype(dtype)], axis=-1))

        x = self.conv_in(latents)
        skips = [x]
        for block in self.down_blocks:
            x, new = block(x, temb, context)
            skips += new
        x = self.mid_block(x, temb, context)
        for up_block in self.up_blocks:
            x = up_block(x, temb, context, skips)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))

    def sinusoid(self, values: jax.Array, dim: int) -> jax.Array:
        return timestep_embedding(values, dim, flip_sin_to_cos=self.flip, freq_shift=self.shift)


def _transformer_for(kind: str, direction: str, make):
    if kind == f"CrossAttn{direction}Block2D":
        return make
    if kind == f"{direction}Block2D":
        return None
    raise ValueError(f"UNet config: block type {kind!r} is not supported.")
