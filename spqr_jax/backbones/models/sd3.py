"""SD3Transformer2DModel, the transformer of two streams of Stable Diffusion 3 and 3.5 (Esser et al. 2024).

Follows diffusers' module of the same name (arXiv 2403.03206), with its attribute names and config fields. Image tokens
and text tokens have weights of their own, and meet in one attention. SD3.5 normalises queries and keys, and the first
blocks of its medium size have a second attention over image tokens alone.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spqr_jax.backbones.models.attention import attention
from spqr_jax.backbones.models.layers import (
    Conv,
    Identity,
    Linear,
    RMSNorm,
    TimestepEmbedding,
    timestep_embedding,
)
from spqr_jax.backbones.models.remat import layer
from spqr_jax.devices.target import CPU

DEFAULTS: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 18,
    "attention_head_dim": 64,
    "num_attention_heads": 18,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1152,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 96,
    "dual_attention_layers": (),
    "qk_norm": None,
}
EPS = 1e-6
TIME_CHANNELS = 256


def normed(x: jax.Array) -> jax.Array:
    """Layer normalisation over the last axis without weights, computed in float32."""
    x32 = x.astype(jnp.float32)
    centred = x32 - x32.mean(-1, keepdims=True)
    return (centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + EPS)).astype(x.dtype)


def modulated(x: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    """x [B, L, C] scaled by 1 + scale [B, C] and shifted by shift [B, C]."""
    return x * (1 + scale[:, None]) + shift[:, None]


class AdaLayerNormZero(nnx.Module):
    """x [B, L, C], temb [B, C] -> normalised and modulated x, then gate, MLP's shift, scale and gate, each [B, C]."""

    parts = 6

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.linear = Linear(dim, self.parts * dim, rngs=rngs)

    def __call__(self, x: jax.Array, temb: jax.Array) -> tuple[jax.Array, ...]:
        shift, scale, *rest = jnp.split(self.linear(jax.nn.silu(temb)), self.parts, axis=-1)
        return modulated(normed(x), scale, shift), *rest


class SD35AdaLayerNormZeroX(AdaLayerNormZero):
    """As AdaLayerNormZero; then x modulated for the second attention, and its gate."""

    parts = 9

    def __call__(self, x: jax.Array, temb: jax.Array) -> tuple[jax.Array, ...]:
        first, gate, shift_mlp, scale_mlp, gate_mlp, shift, scale, gate2 = super().__call__(x, temb)
        return first, gate, shift_mlp, scale_mlp, gate_mlp, modulated(normed(x), scale, shift), gate2


class AdaLayerNormContinuous(nnx.Module):
    """x [B, L, C], temb [B, C] -> normalised and modulated x. The scale comes first here."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.linear = Linear(dim, 2 * dim, rngs=rngs)

    def __call__(self, x: jax.Array, temb: jax.Array) -> jax.Array:
        scale, shift = jnp.split(self.linear(jax.nn.silu(temb)), 2, axis=-1)
        return modulated(normed(x), scale, shift)


class JointAttention(nnx.Module):
    """diffusers' Attention as SD3 calls it: image tokens x [B, L, C] with text tokens [B, M, C], or alone.

    added: the weights of text tokens exist. context_pre_only: text tokens are read, and their output is not used.
    """

    def __init__(
        self, dim: int, heads: int, *, qk_norm: bool, added: bool, context_pre_only: bool = False, rngs: nnx.Rngs
    ):
        def linear(exists: bool = True):
            return Linear(dim, dim, rngs=rngs) if exists else nnx.data(None)

        def norm(exists: bool):
            return RMSNorm(dim // heads, eps=EPS, rngs=rngs) if exists else nnx.data(None)

        self.to_q, self.to_k, self.to_v = linear(), linear(), linear()
        self.add_q_proj, self.add_k_proj, self.add_v_proj = linear(added), linear(added), linear(added)
        self.norm_q, self.norm_k = norm(qk_norm), norm(qk_norm)
        self.norm_added_q, self.norm_added_k = norm(qk_norm and added), norm(qk_norm and added)
        self.to_out = nnx.List([linear(), Identity()])
        self.to_add_out = linear(added and not context_pre_only)
        self.heads = heads
        self.target = CPU

    def __call__(self, x: jax.Array, context: jax.Array | None = None) -> Any:
        q, k, v = self.heads_of(x, (self.to_q, self.to_k, self.to_v), (self.norm_q, self.norm_k))
        if context is not None:
            projections = self.add_q_proj, self.add_k_proj, self.add_v_proj
            text = self.heads_of(context, projections, (self.norm_added_q, self.norm_added_k))
            q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip((q, k, v), text, strict=True))
        out = attention(q, k, v, target=self.target).reshape(*q.shape[:2], -1)
        if context is None:
            return self.to_out[0](out)
        own, of_text = out[:, : x.shape[1]], out[:, x.shape[1] :]
        return self.to_out[0](own), of_text if self.to_add_out is None else self.to_add_out(of_text)

    def heads_of(self, x: jax.Array, projections: tuple, norms: tuple) -> tuple[jax.Array, ...]:
        """Queries, keys and values [B, L, N, D], the first two normalised if there are norms."""
        q, k, v = (project(x).reshape(*x.shape[:2], self.heads, -1) for project in projections)
        norm_q, norm_k = norms
        return q if norm_q is None else norm_q(q), k if norm_k is None else norm_k(k), v


class GELU(nnx.Module):
    """A linear layer, then GELU in its tanh form."""

    def __init__(self, din: int, dout: int, *, rngs: nnx.Rngs):
        self.proj = Linear(din, dout, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.nn.gelu(self.proj(x), approximate=True)


class FeedForward(nnx.Module):
    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.net = nnx.List([GELU(dim, 4 * dim, rngs=rngs), Identity(), Linear(4 * dim, dim, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        for part in self.net:
            x = part(x)
        return x


class JointTransformerBlock(nnx.Module):
    """Text tokens [B, M, C] and image tokens [B, L, C] -> both. The last block has no use for text tokens after it."""

    def __init__(self, dim: int, heads: int, *, last: bool, dual: bool, qk_norm: bool, rngs: nnx.Rngs):
        self.norm1 = (SD35AdaLayerNormZeroX if dual else AdaLayerNormZero)(dim, rngs=rngs)
        self.norm1_context = (AdaLayerNormContinuous if last else AdaLayerNormZero)(dim, rngs=rngs)
        self.attn = JointAttention(dim, heads, qk_norm=qk_norm, added=True, context_pre_only=last, rngs=rngs)
        self.attn2 = JointAttention(dim, heads, qk_norm=qk_norm, added=False, rngs=rngs) if dual else nnx.data(None)
        self.ff = FeedForward(dim, rngs=rngs)
        self.ff_context = nnx.data(None) if last else FeedForward(dim, rngs=rngs)

    def __call__(self, x: jax.Array, context: jax.Array, temb: jax.Array) -> tuple[jax.Array, jax.Array]:
        own, gate, *mlp = self.norm1(x, temb)
        text: Any = self.norm1_context(context, temb)
        text, *of_text = (text,) if self.ff_context is None else text
        out, out_text = self.attn(own, text)
        x = x + gate[:, None] * out
        if self.attn2 is not None:
            *mlp, second, gate2 = mlp
            x = x + gate2[:, None] * self.attn2(second)
        x = with_mlp(x, self.ff, *mlp)
        if self.ff_context is not None:
            gate, *mlp = of_text
            context = with_mlp(context + gate[:, None] * out_text, self.ff_context, *mlp)
        return context, x


def with_mlp(x: jax.Array, mlp: FeedForward, shift: jax.Array, scale: jax.Array, gate: jax.Array) -> jax.Array:
    return x + gate[:, None] * mlp(modulated(normed(x), scale, shift))


class PatchEmbed(nnx.Module):
    """Latents [B, H, W, C] -> tokens [B, L, D] with positions: the middle of a table of `side` x `side` places.

    The table is in the weights, since files hold it, but it is no parameter: no profile trains it.
    """

    def __init__(self, c: dict[str, Any], dim: int, *, rngs: nnx.Rngs):
        self.patch, self.side = c["patch_size"], c["pos_embed_max_size"]
        self.proj = Conv(c["in_channels"], dim, self.patch, stride=self.patch, padding=0, rngs=rngs)
        self.pos_embed = nnx.Param(jnp.asarray(positions(dim, self.side, c["sample_size"] // self.patch))[None])

    def __call__(self, latents: jax.Array) -> jax.Array:
        x = self.proj(latents)
        height, width, dim = x.shape[1:]
        if max(height, width) > self.side:
            raise ValueError(
                f"SD3: latents of {latents.shape[1]}x{latents.shape[2]} are {height}x{width} patches; the table of "
                f"positions has {self.side}x{self.side} (pos_embed_max_size). Make smaller images."
            )
        top, left = (self.side - height) // 2, (self.side - width) // 2
        table = self.pos_embed[...].reshape(self.side, self.side, dim)[top : top + height, left : left + width]
        return (x + table).reshape(len(x), -1, dim).astype(x.dtype)


def positions(dim: int, side: int, base: int) -> np.ndarray:
    """Sines and cosines of column, then row, float32 [side * side, dim]; places are counted in units of side / base."""
    place = np.arange(side, dtype=np.float32) / np.float32(side / base)
    omega = 1 / 10000 ** (np.arange(dim // 4) / (dim / 4))
    angles = np.outer(place, omega)
    waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    columns, rows = np.tile(waves, (side, 1)), np.repeat(waves, side, axis=0)
    return np.concatenate([columns, rows], axis=1).astype(np.float32)


class CombinedTimestepTextProjEmbeddings(nnx.Module):
    """Times [B] and pooled text states [B, P] -> [B, C]."""

    def __init__(self, dim: int, pooled: int, *, rngs: nnx.Rngs):
        self.timestep_embedder = TimestepEmbedding(TIME_CHANNELS, dim, rngs=rngs)
        # diffusers' PixArtAlphaTextProjection with SiLU has the same layers and names.
        self.text_embedder = TimestepEmbedding(pooled, dim, rngs=rngs)

    def __call__(self, times: jax.Array, pooled: jax.Array) -> jax.Array:
        return self.timestep_embedder(self.sinusoid(times).astype(pooled.dtype)) + self.text_embedder(pooled)

    def sinusoid(self, times: jax.Array) -> jax.Array:
        return timestep_embedding(times, TIME_CHANNELS, flip_sin_to_cos=True, freq_shift=0)


class SD3Transformer2DModel(nnx.Module):
    """Predicts noise minus latents.

    A call takes latents [B, H, W, C], times [B] (noise level times 1000, a fraction), text states `context` [B, M, E]
    and pooled text states [B, P]. It returns [B, H, W, C]. Raises ValueError for a config field that is not supported,
    and for latents that are larger than the table of positions.
    """

    def __init__(self, config: dict[str, Any], *, rngs: nnx.Rngs):
        c = DEFAULTS | {k: v for k, v in config.items() if k in DEFAULTS}
        if c["qk_norm"] not in (None, "rms_norm"):
            raise ValueError(f"SD3 config: qk_norm={c['qk_norm']!r} is not supported (expected None or 'rms_norm').")
        heads, count = c["num_attention_heads"], c["num_layers"]
        dim = heads * c["attention_head_dim"]
        if c["caption_projection_dim"] != dim:
            raise ValueError(
                f"SD3 config: caption_projection_dim={c['caption_projection_dim']} is not {dim}, as in SD3."
            )
        self.pos_embed = PatchEmbed(c, dim, rngs=rngs)
        self.time_text_embed = CombinedTimestepTextProjEmbeddings(dim, c["pooled_projection_dim"], rngs=rngs)
        self.context_embedder = Linear(c["joint_attention_dim"], dim, rngs=rngs)
        dual, qk_norm = set(c["dual_attention_layers"]), c["qk_norm"] is not None
        self.transformer_blocks = nnx.List(
            [
                JointTransformerBlock(dim, heads, last=i == count - 1, dual=i in dual, qk_norm=qk_norm, rngs=rngs)
                for i in range(count)
            ]
        )
        self.norm_out = AdaLayerNormContinuous(dim, rngs=rngs)
        self.patch, self.channels = c["patch_size"], c["out_channels"] or c["in_channels"]
        self.proj_out = Linear(dim, self.patch**2 * self.channels, rngs=rngs)

    def __call__(self, latents: jax.Array, times: jax.Array, context: jax.Array, pooled: jax.Array) -> jax.Array:
        dtype = self.proj_out.kernel.dtype
        x = self.pos_embed(latents.astype(dtype))
        temb = self.time_text_embed(times, pooled.astype(dtype))
        context = self.context_embedder(context.astype(dtype))
        for block in self.transformer_blocks:
            context, x = layer(block, x, context, temb)
        return self.unpatched(self.proj_out(self.norm_out(x, temb)), latents.shape)

    def unpatched(self, tokens: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Tokens [B, L, patch * patch * C] -> [B, H, W, C] of latents of `shape`."""
        batch, height, width = shape[0], shape[1] // self.patch, shape[2] // self.patch
        x = tokens.reshape(batch, height, width, self.patch, self.patch, self.channels).swapaxes(2, 3)
        return x.reshape(batch, height * self.patch, width * self.patch, self.channels)
