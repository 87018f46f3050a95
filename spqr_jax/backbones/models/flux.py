"""FluxTransformer2DModel of FLUX.1 dev and schnell (Black Forest Labs, 2024).

Follows diffusers' module of the same name, with its attribute names and config fields. Packing latents into tokens and
placing them, which diffusers leaves to the pipeline, are part of the model here.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spqr_jax.backbones.models import remat
from spqr_jax.backbones.models.attention import attention
from spqr_jax.backbones.models.layers import Linear, RMSNorm, TimestepEmbedding
from spqr_jax.backbones.models.sd3 import (
    TIME_CHANNELS,
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    CombinedTimestepTextProjEmbeddings,
    FeedForward,
    with_mlp,
)
from spqr_jax.devices.target import CPU

DEFAULTS: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": False,
    "axes_dims_rope": (16, 56, 56),
}
# What diffusers offers and FLUX.1 leaves at this value; anything else is refused.
FIXED: dict[str, Any] = {"patch_size": 1, "out_channels": None}

PATCH = 2  # latents along each side of the patch that is one token
THETA = 10_000
# Cosines and sines [L, D] of the tokens' places.
Rotary = tuple[jax.Array, jax.Array]


class Tokens(NamedTuple):
    """What a block reads: tokens of the image [B, L, C] and of the text [B, M, C], the time [B, C], and the places."""

    image: jax.Array
    text: jax.Array
    temb: jax.Array
    rotary: Rotary


def _checked(config: dict[str, Any]) -> dict[str, Any]:
    c = DEFAULTS | {field: value for field, value in config.items() if field in DEFAULTS}
    for field, value in FIXED.items():
        found = config.get(field)
        if found is not None and found != value and not (field == "out_channels" and found == c["in_channels"]):
            raise ValueError(f"FLUX config: {field}={found!r} is not supported (expected {value!r}).")
    if sum(c["axes_dims_rope"]) != c["attention_head_dim"]:
        raise ValueError(
            f"FLUX config: axes_dims_rope={c['axes_dims_rope']!r} must sum to attention_head_dim="
            f"{c['attention_head_dim']}."
        )
    return c


def packed(latents: jax.Array) -> jax.Array:
    """Latents [B, H, W, C], H and W even -> tokens [B, H/2 * W/2, 4 C], the channels of a token as (C, row, column)."""
    batch, height, width, channels = latents.shape
    patches = latents.reshape(batch, height // PATCH, PATCH, width // PATCH, PATCH, channels)
    return patches.transpose(0, 1, 3, 5, 2, 4).reshape(batch, -1, PATCH * PATCH * channels)


def unpacked(tokens: jax.Array, height: int, width: int) -> jax.Array:
    """The inverse of `packed`, for latents of this size."""
    patches = tokens.reshape(len(tokens), height // PATCH, width // PATCH, -1, PATCH, PATCH)
    return patches.transpose(0, 1, 4, 2, 5, 3).reshape(len(tokens), height, width, -1)


def places(texts: int, height: int, width: int) -> np.ndarray:
    """The places of all tokens, int32 [L, 3]: zeros for the texts', then (0, row, column) of each patch."""
    rows, columns = np.divmod(np.arange(height // PATCH * (width // PATCH)), width // PATCH)
    patches = np.stack([np.zeros_like(rows), rows, columns], axis=1)
    return np.concatenate([np.zeros((texts, 3), np.int32), patches.astype(np.int32)])


def rotated(x: jax.Array, rotary: Rotary) -> jax.Array:
    """Queries or keys [B, L, N, D], each pair of channels rotated by its angle, in float32."""
    cos, sin = (table[:, None] for table in rotary)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    turned = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(x.shape)
    return (x.astype(jnp.float32) * cos + turned * sin).astype(x.dtype)


class FluxPosEmbed(nnx.Module):
    """Places [L, A] -> cosines and sines, float32 [L, D] each. Axis a turns `axes[a]` of the D channels of a head."""

    def __init__(self, axes: tuple[int, ...]):
        self.axes = axes

    def __call__(self, ids: np.ndarray) -> Rotary:
        cos, sin = zip(*(self._of_axis(dim, ids[:, axis]) for axis, dim in enumerate(self.axes)), strict=True)
        return jnp.concatenate(cos, axis=-1), jnp.concatenate(sin, axis=-1)

    def _of_axis(self, dim: int, places: np.ndarray) -> Rotary:
        """[L, dim] each. The angles of every place are computed in float64, once."""
        angles = np.outer(np.arange(places.max() + 1), 1 / THETA ** (np.arange(0, dim, 2) / dim))
        tables = (np.repeat(function(angles), 2, axis=1).astype(np.float32) for function in (np.cos, np.sin))
        cos, sin = (jnp.asarray(table)[places] for table in tables)
        return cos, sin


class CombinedTimestepGuidanceTextProjEmbeddings(CombinedTimestepTextProjEmbeddings):
    """Times [B], pooled text states [B, P] and scales of guidance times 1000 [B] -> [B, C]."""

    def __init__(self, dim: int, pooled: int, *, rngs: nnx.Rngs):
        super().__init__(dim, pooled, rngs=rngs)
        self.guidance_embedder = TimestepEmbedding(TIME_CHANNELS, dim, rngs=rngs)

    def __call__(self, times: jax.Array, pooled: jax.Array, guidance: jax.Array | None = None) -> jax.Array:
        assert guidance is not None  # a model that is distilled with guidance is always told its scale
        return super().__call__(times, pooled) + self.guidance_embedder(self.sinusoid(guidance).astype(pooled.dtype))

    def sinusoid(self, times: jax.Array) -> jax.Array:
        """Cosines and sines [B, D]. Frequencies are rounded as PyTorch rounds them: scales of guidance are thousands,
        and a last digit of a frequency would turn their angles by 1e-4."""
        count = TIME_CHANNELS // 2
        exponents = -math.log(10_000) * np.arange(count, dtype=np.float32) / np.float32(count)
        angles = times.astype(jnp.float32)[:, None] * np.exp(exponents.astype(np.float64)).astype(np.float32)
        return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class FluxAttention(nnx.Module):
    """Attention over the tokens of image and text together: x [B, L, C] -> [B, L, C].

    With `context` [B, M, C] (double blocks) the texts have projections of their own, and both are returned. Without it
    (`single`) x holds the text's tokens too, and the block projects the output.
    """

    def __init__(self, dim: int, heads: int, *, single: bool, rngs: nnx.Rngs):
        depth = dim // heads
        self.norm_q = RMSNorm(depth, rngs=rngs)
        self.norm_k = RMSNorm(depth, rngs=rngs)
        self.to_q = Linear(dim, dim, rngs=rngs)
        self.to_k = Linear(dim, dim, rngs=rngs)
        self.to_v = Linear(dim, dim, rngs=rngs)
        if not single:
            self.to_out = nnx.List([Linear(dim, dim, rngs=rngs)])
            self.norm_added_q = RMSNorm(depth, rngs=rngs)
            self.norm_added_k = RMSNorm(depth, rngs=rngs)
            self.add_q_proj = Linear(dim, dim, rngs=rngs)
            self.add_k_proj = Linear(dim, dim, rngs=rngs)
            self.add_v_proj = Linear(dim, dim, rngs=rngs)
            self.to_add_out = Linear(dim, dim, rngs=rngs)
        self.heads = heads
        self.target = CPU

    def __call__(self, x: jax.Array, context: jax.Array | None, rotary: Rotary) -> Any:
        out = attention(*self._projected(x, context, rotary), target=self.target)
        out = out.reshape(*out.shape[:2], -1)
        if context is None:
            return out
        texts = context.shape[1]
        return self.to_out[0](out[:, texts:]), self.to_add_out(out[:, :texts])

    def probabilities(self, x: jax.Array, context: jax.Array | None, rotary: Rotary) -> jax.Array:
        """What each token pays to each, float32 [B, heads, queries, keys], the text's tokens first."""
        q, k, _ = self._projected(x, context, rotary)
        scores = jnp.einsum("blnd,bmnd->bnlm", q, k, preferred_element_type=jnp.float32)
        return jax.nn.softmax(scores / math.sqrt(q.shape[-1]), axis=-1)

    def _projected(self, x: jax.Array, context: jax.Array | None, rotary: Rotary) -> tuple[jax.Array, ...]:
        """Queries, keys and values [B, L, N, D] of all tokens, the text's first."""
        q, k, v = (self._split(t) for t in (self.to_q(x), self.to_k(x), self.to_v(x)))
        q, k = self.norm_q(q), self.norm_k(k)
        if context is not None:
            own = (self.add_q_proj(context), self.add_k_proj(context), self.add_v_proj(context))
            text_q, text_k, text_v = (self._split(t) for t in own)
            text_q, text_k = self.norm_added_q(text_q), self.norm_added_k(text_k)
            q, k, v = (jnp.concatenate(pair, axis=1) for pair in ((text_q, q), (text_k, k), (text_v, v)))
        return rotated(q, rotary), rotated(k, rotary), v

    def _split(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:2], self.heads, -1)


class AdaLayerNormZeroSingle(AdaLayerNormZero):
    """x [B, L, C], temb [B, C] -> normalised and modulated x, and the gate [B, C] of the block."""

    parts = 3


class FluxTransformerBlock(nnx.Module):
    """A double block: image [B, L, C] and text [B, M, C] meet in attention and have all else of their own.

    It returns text, then image, as in diffusers.
    """

    def __init__(self, dim: int, heads: int, *, rngs: nnx.Rngs):
        self.norm1 = AdaLayerNormZero(dim, rngs=rngs)
        self.norm1_context = AdaLayerNormZero(dim, rngs=rngs)
        self.attn = FluxAttention(dim, heads, single=False, rngs=rngs)
        self.ff = FeedForward(dim, rngs=rngs)
        self.ff_context = FeedForward(dim, rngs=rngs)

    def __call__(
        self, x: jax.Array, context: jax.Array, temb: jax.Array, rotary: Rotary
    ) -> tuple[jax.Array, jax.Array]:
        own, gate, *mlp = self.norm1(x, temb)
        text, text_gate, *text_mlp = self.norm1_context(context, temb)
        attended, text_attended = self.attn(own, text, rotary)
        x = with_mlp(x + gate[:, None] * attended, self.ff, *mlp)
        return with_mlp(context + text_gate[:, None] * text_attended, self.ff_context, *text_mlp), x

    def probabilities(self, x: jax.Array, context: jax.Array, temb: jax.Array, rotary: Rotary) -> jax.Array:
        """`FluxAttention.probabilities` of this block."""
        return self.attn.probabilities(self.norm1(x, temb)[0], self.norm1_context(context, temb)[0], rotary)


class FluxSingleTransformerBlock(nnx.Module):
    """A single block: the tokens of text and image in one row, attention and feed-forward layer side by side."""

    def __init__(self, dim: int, heads: int, *, rngs: nnx.Rngs):
        self.norm = AdaLayerNormZeroSingle(dim, rngs=rngs)
        self.proj_mlp = Linear(dim, 4 * dim, rngs=rngs)
        self.proj_out = Linear(5 * dim, dim, rngs=rngs)
        self.attn = FluxAttention(dim, heads, single=True, rngs=rngs)

    def __call__(
        self, x: jax.Array, context: jax.Array, temb: jax.Array, rotary: Rotary
    ) -> tuple[jax.Array, jax.Array]:
        texts, both = context.shape[1], jnp.concatenate([context, x], axis=1)
        own, gate = self.norm(both, temb)
        mlp = jax.nn.gelu(self.proj_mlp(own), approximate=True)
        attended = self.attn(own, None, rotary)
        both = both + gate[:, None] * self.proj_out(jnp.concatenate([attended, mlp], axis=-1))
        return both[:, :texts], both[:, texts:]


class FluxTransformer2DModel(nnx.Module):
    """Predicts the velocity, noise minus latents.

    A call takes latents [B, H, W, C] (H and W even), times [B] in 0..1000, T5's text states `context` [B, M, E] and
    CLIP's pooled text states [B, P]; a model with `guidance_embeds` (dev) also the scale of distilled guidance [B]. It
    returns [B, H, W, C], in the dtype of the weights. Raises ValueError for a config field that is not supported.
    """

    def __init__(self, config: dict[str, Any], *, rngs: nnx.Rngs):
        c = _checked(config)
        heads = c["num_attention_heads"]
        dim = heads * c["attention_head_dim"]
        self.pos_embed = FluxPosEmbed(tuple(c["axes_dims_rope"]))
        guided = c["guidance_embeds"]
        embeddings = CombinedTimestepGuidanceTextProjEmbeddings if guided else CombinedTimestepTextProjEmbeddings
        self.time_text_embed = embeddings(dim, c["pooled_projection_dim"], rngs=rngs)
        self.context_embedder = Linear(c["joint_attention_dim"], dim, rngs=rngs)
        self.x_embedder = Linear(c["in_channels"], dim, rngs=rngs)
        self.transformer_blocks = nnx.List(
            [FluxTransformerBlock(dim, heads, rngs=rngs) for _ in range(c["num_layers"])]
        )
        self.single_transformer_blocks = nnx.List(
            [FluxSingleTransformerBlock(dim, heads, rngs=rngs) for _ in range(c["num_single_layers"])]
        )
        self.norm_out = AdaLayerNormContinuous(dim, rngs=rngs)
        self.proj_out = Linear(dim, c["in_channels"], rngs=rngs)

    def __call__(
        self,
        latents: jax.Array,
        times: jax.Array,
        context: jax.Array,
        pooled: jax.Array,
        guidance: jax.Array | None = None,
    ) -> jax.Array:
        tokens = self._embedded(latents, times, context, pooled, guidance)
        blocks = (*self.transformer_blocks, *self.single_transformer_blocks)
        return self._finished(_through(blocks, tokens), latents.shape)

    def predicted_and_attended(
        self,
        latents: jax.Array,
        times: jax.Array,
        context: jax.Array,
        pooled: jax.Array,
        guidance: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """The result of a call, and what tokens pay to tokens in the last double block, float32 [B, heads, L, L].

        The text's tokens come first.
        """
        *first, last = self.transformer_blocks
        tokens = _through(first, self._embedded(latents, times, context, pooled, guidance))
        attended = last.probabilities(*tokens)
        tokens = _through((last, *self.single_transformer_blocks), tokens)
        return self._finished(tokens, latents.shape), attended

    def _embedded(self, latents, times, context, pooled, guidance) -> Tokens:
        dtype = self.x_embedder.kernel.dtype
        rotary = self.pos_embed(places(context.shape[1], *latents.shape[1:3]))
        scales = () if guidance is None else (guidance * 1000,)
        temb = self.time_text_embed(times, pooled.astype(dtype), *scales)
        x, text = self.x_embedder(packed(latents.astype(dtype))), self.context_embedder(context.astype(dtype))
        return Tokens(x, text, temb, rotary)

    def _finished(self, tokens: Tokens, shape: tuple[int, ...]) -> jax.Array:
        return unpacked(self.proj_out(self.norm_out(tokens.image, tokens.temb)), *shape[1:3])


def _through(blocks: Iterable[nnx.Module], tokens: Tokens) -> Tokens:
    """The tokens after these blocks."""
    for block in blocks:
        text, image = remat.layer(block, *tokens)
        tokens = tokens._replace(image=image, text=text)
    return tokens
