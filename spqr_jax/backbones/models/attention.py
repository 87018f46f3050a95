"""Scaled dot-product attention. `attention()` chooses a formulation by the target and the shapes."""

import math

import jax
import jax.numpy as jnp

from spqr_jax.devices.target import CPU, Target

# Above this many scores per head, CPU attention runs one head at a time so that the scores stay in cache.
MAPPED_MIN_SCORES = 65_536
QUERY_CHUNK = 1024


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, target: Target = CPU, mask: jax.Array | None = None
) -> jax.Array:
    """Scaled dot-product attention with softmax in float32: [B, L, N, D], [B, M, N, D] -> [B, L, N, D].

    `mask` [L, M] or [B, L, M] is True where a query may look. For CUDA in half precision cuDNN's flash attention is
    used where its head sizes allow; for a CPU large score matrices are computed head by head.
    """
    queries, keys, depth = q.shape[1], k.shape[1], q.shape[3]
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    if target.platform == "cuda" and half and depth % 8 == 0 and depth <= 128 and mask is None:
        return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    if target.platform == "cpu" and mask is None and queries * keys >= MAPPED_MIN_SCORES:
        return mapped(q, k, v)
    return plain(q, k, v, mask)


def plain(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """All scores at once; shapes as in `attention`."""
    scores = jnp.einsum("blnd,bmnd->bnlm", q, k, preferred_element_type=jnp.float32) / math.sqrt(q.shape[3])
    if mask is not None:
        scores = jnp.where(mask if mask.ndim == 2 else mask[:, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bnlm,bmnd->blnd", weights, v)


def mapped(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """One head and one chunk of queries at a time: plain 2-D products, normalised after the value product."""
    batch, queries, heads, depth = q.shape

    def to_heads(x):
        return x.transpose(0, 2, 1, 3).reshape(batch * heads, x.shape[1], depth)

    def one_head(head):
        q1, k1, v1 = head

        def one_chunk(chunk):
            scores = (chunk @ k1.T).astype(jnp.float32) / math.sqrt(depth)
            weights = jnp.exp(scores - scores.max(-1, keepdims=True))
            return ((weights.astype(v1.dtype) @ v1) / weights.sum(-1, keepdims=True)).astype(v1.dtype)

        if queries % QUERY_CHUNK or queries == QUERY_CHUNK:
            return one_chunk(q1)
        return jax.lax.map(one_chunk, q1.reshape(-1, QUERY_CHUNK, depth)).reshape(queries, depth)

    out = jax.lax.map(one_head, (to_heads(q), to_heads(k), to_heads(v)))
    return out.reshape(batch, heads, queries, depth).transpose(0, 2, 1, 3)
