"""The condition of many texts, for states that do not fit into memory: T5-XXL's take 2.7 MB a text in 16 bits."""

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from spqr_jax.backbones.base import Condition

ROWS = 256  # texts whose states are on the device at once
LARGE = 2**30  # bytes from which on a field is a memory-mapped file, which is gone when nobody reads it


def in_blocks(
    encode: Callable[[Sequence[str], Sequence[int]], Condition], texts: Sequence[str], unconditional: Sequence[int]
) -> Condition:
    """encode(texts, unconditional) on the host, ROWS texts at a time. The states keep the dtype that they come in.

    encode: as `Backbone.condition`, for a pipeline and a size.
    """
    rows = {row % len(texts) for row in unconditional}
    fields: list[np.ndarray] = []
    tree: Any = None
    for start in range(0, len(texts), ROWS):
        own = [row - start for row in rows if start <= row < start + ROWS]
        leaves, tree = jax.tree.flatten(encode(texts[start : start + ROWS], own))
        fields = fields or [_room((len(texts), *leaf.shape[1:]), leaf.dtype) for leaf in leaves]
        for field, leaf in zip(fields, leaves, strict=True):
            field[start : start + len(leaf)] = np.asarray(leaf)
    return jax.tree.unflatten(tree, fields)


def _room(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    if int(np.prod(shape)) * np.dtype(dtype).itemsize < LARGE:
        return np.empty(shape, dtype)
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, dtype, "w+", shape=shape)
