"""Scaled dot-product attention. `attention()` chooses a formulation by the target and the shapes."""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from spqr_jax.devices.target import CPU, Target

# Above this many scores per head, CPU attention runs one head at a time so that the scores stay in cache.
MAPPED_MIN_SCORES = 65_536
QUERY_CHUNK = 1024
# Where no kernel serves an accelerator: queries at a time, and the scores of all heads that then stand in memory.
BLOCK_MAX_QUERIES, BLOCK_MAX_SCORES = 1024, 2**26
# cuDNN's flash attention: head sizes that every card takes, and lengths that training takes (it refuses odd ones).
CUDNN_MAX_DEPTH, CUDNN_MULTIPLE = 128, 8
# The Pallas kernel for TPUs: fewer scores than these fit beside the rest, and a length must be whole blocks.
TILED_MIN_QUERIES = 1024
TILES = (512, 256, 128)


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    target: Target = CPU,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Scaled dot-product attention with softmax in float32: [B, L, N, D], [B, M, N, D] -> [B, L, N, D].

    `mask` [L, M] or [B, L, M] is True where a query may look. `bias` [N, L, M] is added to scores, which are then not
    scaled, as in T5. Without either: for CUDA in half precision cuDNN's flash attention where its head sizes allow, for
    a TPU the Pallas kernel where tokens are many, for a CPU large score matrices head by head, and elsewhere many
    queries block by block.
    """
    if bias is not None:
        return plain(q, k, v, mask, bias)
    if mask is None and target.platform == "cuda" and _cudnn_takes(q):
        return padded(q, k, v, implementation="cudnn")
    if mask is None and target.mesh is not None and _pallas_takes(q, k, target.mesh):
        return tiled(q, k, v, target.mesh)
    if mask is None and target.platform == "cpu" and q.shape[1] * k.shape[1] >= MAPPED_MIN_SCORES:
        return mapped(q, k, v)
    if mask is None and target.platform != "cpu" and q.shape[1] > BLOCK_MAX_QUERIES:
        return blockwise(q, k, v)
    return plain(q, k, v, mask)


def plain(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None, bias: jax.Array | None = None
) -> jax.Array:
    """All scores at once; shapes as in `attention`."""
    products = _products if q.dtype == jnp.float32 else _half_products
    scores = products(q, k)
    scores = scores / math.sqrt(q.shape[3]) if bias is None else scores + bias.astype(jnp.float32)
    if mask is not None:
        scores = jnp.where(mask if mask.ndim == 2 else mask[:, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bnlm,bmnd->blnd", weights, v)


def _products(q: jax.Array, k: jax.Array) -> jax.Array:
    """[B, L, N, D], [B, M, N, D] -> float32 [B, N, L, M]."""
    return jnp.einsum("blnd,bmnd->bnlm", q, k, preferred_element_type=jnp.float32)


# The gradient of float32 scores is rounded for its products, as flash attention does. JAX's own rule would make these
# products float32. Only alignment asks for derivatives of derivatives, which this has not, and it is in float32.
_half_products = jax.custom_vjp(_products)


def _half_products_bwd(inputs: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    q, k = inputs
    gradient = gradient.astype(q.dtype)
    return jnp.einsum("bnlm,bmnd->blnd", gradient, k), jnp.einsum("bnlm,blnd->bmnd", gradient, q)


_half_products.defvjp(lambda q, k: (_products(q, k), (q, k)), _half_products_bwd)


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


def blockwise(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """`plain` for one block of queries at a time, so that scores stay few, in the backward pass too.

    Shapes as in `attention`. A block has at most BLOCK_MAX_QUERIES queries, and, unless it would be smaller than 128,
    BLOCK_MAX_SCORES scores.
    """
    batch, queries, heads, depth = q.shape
    most = min(BLOCK_MAX_QUERIES, max(128, BLOCK_MAX_SCORES // (batch * heads * k.shape[1])))
    blocks = -(-queries // most)
    size = -(-queries // blocks)
    q = jnp.pad(q, ((0, 0), (0, blocks * size - queries), (0, 0), (0, 0)))
    # The gradients of keys and values are sums over blocks: in float32, as those of one product are.
    keys, values = k.astype(jnp.float32), v.astype(jnp.float32)

    @jax.checkpoint
    def one_block(block):
        return plain(block, keys.astype(k.dtype), values.astype(v.dtype))

    out = jax.lax.map(one_block, q.reshape(batch, blocks, size, heads, depth).swapaxes(0, 1))
    return out.swapaxes(0, 1).reshape(batch, -1, heads, depth)[:, :queries]


def _cudnn_takes(q: jax.Array) -> bool:
    depth = q.shape[3]
    return q.dtype in (jnp.bfloat16, jnp.float16) and depth % 8 == 0 and depth <= CUDNN_MAX_DEPTH


def padded(q: jax.Array, k: jax.Array, v: jax.Array, *, implementation: Literal["cudnn", "xla"]) -> jax.Array:
    """JAX's own attention over lengths padded to a multiple of 8; shapes as in `attention`.

    The true number of keys is told, so padded keys get no weight. The rows of padded queries are cut off again.
    """
    (batch, queries), keys = q.shape[:2], k.shape[1]
    lengths = jnp.full(batch, keys, jnp.int32) if keys % CUDNN_MULTIPLE else None
    q, k, v = (_to_multiple(x) for x in (q, k, v))
    out = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation=implementation)
    return out[:, :queries]


def _to_multiple(x: jax.Array) -> jax.Array:
    """x [B, L, N, D] with zeros behind its tokens, up to a length that cuDNN takes."""
    missing = -x.shape[1] % CUDNN_MULTIPLE
    return jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))) if missing else x


def _pallas_takes(q: jax.Array, k: jax.Array, mesh: Mesh) -> bool:
    """Whether lengths are whole blocks, the kernel has the head size, and the batch divides among the devices."""
    queries, keys, depth = q.shape[1], k.shape[1], q.shape[3]
    whole = queries % TILES[-1] == 0 and keys % TILES[-1] == 0 and (depth <= 128 or depth % 128 == 0)
    return whole and queries >= TILED_MIN_QUERIES and q.shape[0] % mesh.size == 0


def tiled(q: jax.Array, k: jax.Array, v: jax.Array, mesh: Mesh | None) -> jax.Array:
    """The Pallas flash attention kernel for TPUs, each device of the mesh on its own part of the batch.

    Shapes as in `attention`, L and M multiples of 128. Scores are never whole, neither forward nor backward.
    """
    kernel = functools.partial(_kernel, scale=1 / math.sqrt(q.shape[3]))
    if mesh is not None:
        rows = PartitionSpec("data")
        # The kernel does not say along which axes its results differ, so that cannot be checked.
        kernel = jax.shard_map(kernel, mesh=mesh, in_specs=(rows, rows, rows), out_specs=rows, check_vma=False)
    return kernel(q, k, v)


def _kernel(q: jax.Array, k: jax.Array, v: jax.Array, *, scale: float) -> jax.Array:
    from jax.experimental.pallas.ops.tpu import flash_attention as pallas

    of_q, of_k = (next(tile for tile in TILES if x.shape[1] % tile == 0) for x in (q, k))
    sizes = pallas.BlockSizes(
        block_b=1,
        **dict.fromkeys(("block_q", "block_q_major_dkv", "block_q_dkv", "block_q_dq"), of_q),
        **dict.fromkeys(
            ("block_k", "block_k_major", "block_k_dkv", "block_k_major_dkv", "block_k_dq", "block_k_major_dq"), of_k
        ),
    )
    heads_first = (x.swapaxes(1, 2) for x in (q, k, v))
    return pallas.flash_attention(*heads_first, sm_scale=scale, block_sizes=sizes).swapaxes(1, 2)
