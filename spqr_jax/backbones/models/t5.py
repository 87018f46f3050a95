"""T5EncoderModel of version 1.1 (Raffel et al. 2020; Shazeer 2020, arXiv 2002.05202), as SD3 and FLUX read it.

Follows transformers' module of the same name, with its attribute names and config fields: gated GELU, no biases, RMS
norms before each layer, one table of relative positions for all layers, scores without scaling. No token is masked,
padding neither, since diffusers' pipelines of SD3 and FLUX pass no mask.
"""

import math
from typing import Any

import jax
import numpy as np
from flax import nnx

from spqr_jax.backbones.models.attention import attention
from spqr_jax.backbones.models.clip_text import TextOutput
from spqr_jax.backbones.models.layers import Embedding, Linear, RMSNorm
from spqr_jax.devices.target import CPU

DEFAULTS: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
}
GATED = "gated-gelu"  # of version 1.1; transformers then takes GELU's tanh form


def buckets(length: int, count: int, max_distance: int) -> np.ndarray:
    """The row of the table of relative positions for query l and key m: int32 [L, L] in 0..count-1.

    Half of the rows are for keys behind the query. Of each half, one half has a row a distance, and the other half rows
    of logarithmic width up to `max_distance`.
    """
    position = np.arange(length)
    offset = position[None, :] - position[:, None]
    half, distance = count // 2, np.abs(offset)
    exact = half // 2
    # float32, in PyTorch's order of operations: its rounding decides where a row begins.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    far = exact + (ratio / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)).astype(np.int32)
    return (np.where(distance < exact, distance, np.minimum(far, half - 1)) + half * (offset > 0)).astype(np.int32)


class T5Attention(nnx.Module):
    """x [B, L, C], bias [N, L, L] -> [B, L, C]. `relative_attention_bias` is the table, in the first block only."""

    def __init__(self, c: dict[str, Any], *, with_table: bool, rngs: nnx.Rngs):
        dim, inner = c["d_model"], c["num_heads"] * c["d_kv"]
        self.q = Linear(dim, inner, use_bias=False, rngs=rngs)
        self.k = Linear(dim, inner, use_bias=False, rngs=rngs)
        self.v = Linear(dim, inner, use_bias=False, rngs=rngs)
        self.o = Linear(inner, dim, use_bias=False, rngs=rngs)
        rows = c["relative_attention_num_buckets"]
        self.relative_attention_bias = (
            Embedding(rows, c["num_heads"], stddev=dim**-0.5, rngs=rngs) if with_table else nnx.data(None)
        )
        self.heads = c["num_heads"]
        self.target = CPU

    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        q, k, v = (p(x).reshape(*x.shape[:2], self.heads, -1) for p in (self.q, self.k, self.v))
        return self.o(attention(q, k, v, target=self.target, bias=bias).reshape(*x.shape[:2], -1))


class T5LayerSelfAttention(nnx.Module):
    def __init__(self, c: dict[str, Any], *, with_table: bool, rngs: nnx.Rngs):
        self.SelfAttention = T5Attention(c, with_table=with_table, rngs=rngs)
        self.layer_norm = RMSNorm(c["d_model"], eps=c["layer_norm_epsilon"], rngs=rngs)

    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        return x + self.SelfAttention(self.layer_norm(x), bias)


class T5DenseGatedActDense(nnx.Module):
    def __init__(self, c: dict[str, Any], *, rngs: nnx.Rngs):
        self.wi_0 = Linear(c["d_model"], c["d_ff"], use_bias=False, rngs=rngs)
        self.wi_1 = Linear(c["d_model"], c["d_ff"], use_bias=False, rngs=rngs)
        self.wo = Linear(c["d_ff"], c["d_model"], use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.wo(jax.nn.gelu(self.wi_0(x), approximate=True) * self.wi_1(x))


class T5LayerFF(nnx.Module):
    def __init__(self, c: dict[str, Any], *, rngs: nnx.Rngs):
        self.DenseReluDense = T5DenseGatedActDense(c, rngs=rngs)
        self.layer_norm = RMSNorm(c["d_model"], eps=c["layer_norm_epsilon"], rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.DenseReluDense(self.layer_norm(x))


class T5Block(nnx.Module):
    def __init__(self, c: dict[str, Any], *, with_table: bool, rngs: nnx.Rngs):
        self.layer = nnx.List([T5LayerSelfAttention(c, with_table=with_table, rngs=rngs), T5LayerFF(c, rngs=rngs)])

    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        return self.layer[1](self.layer[0](x, bias))


class T5Stack(nnx.Module):
    """Embedded tokens [B, L, C] -> states of the same shape, and those of the layers before the final norm."""

    def __init__(self, c: dict[str, Any], *, rngs: nnx.Rngs):
        self.block = nnx.List([T5Block(c, with_table=i == 0, rngs=rngs) for i in range(c["num_layers"])])
        self.final_layer_norm = RMSNorm(c["d_model"], eps=c["layer_norm_epsilon"], rngs=rngs)
        self.rows, self.max_distance = c["relative_attention_num_buckets"], c["relative_attention_max_distance"]

    def bias(self, length: int) -> jax.Array:
        """What every layer adds to its scores, [N, L, L]."""
        first: Any = self.block[0].layer[0]
        table = first.SelfAttention.relative_attention_bias
        return table(buckets(length, self.rows, self.max_distance)).transpose(2, 0, 1)

    def __call__(self, x: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        bias, states = self.bias(x.shape[1]), [x]
        for block in self.block:
            states.append(block(states[-1], bias))
        return self.final_layer_norm(states[-1]), states


class T5EncoderModel(nnx.Module):
    """Token ids [B, L] -> TextOutput without pooled states. Raises ValueError for a T5 that is not of version 1.1."""

    def __init__(self, config: dict[str, Any], *, rngs: nnx.Rngs):
        c = DEFAULTS | {k: v for k, v in config.items() if k in DEFAULTS}
        if c["feed_forward_proj"] != GATED:
            raise ValueError(
                f"T5 config: feed_forward_proj={c['feed_forward_proj']!r} is not supported, only {GATED!r}."
            )
        self.shared = Embedding(c["vocab_size"], c["d_model"], stddev=1.0, rngs=rngs)
        self.encoder = T5Stack(c, rngs=rngs)

    def __call__(self, ids: jax.Array) -> TextOutput:
        last, states = self.encoder(self.shared(ids))
        return TextOutput(last, states, None, None)
