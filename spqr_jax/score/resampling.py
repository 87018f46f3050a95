"""Prompts drawn with replacement, and sums over the drawn ones. NumPy only.

A matrix [B, n] says how often replicate b drew prompt i. It depends on n, B and the seed alone, so it serves every
figure of a subject and every subject with the same prompts. A sum over the drawn prompts is the product of this matrix
with a column of n values. A product with one column takes about as long as reading the matrix, and with ten columns
hardly longer. So sums are asked for together. Columns that occur twice are multiplied once: every image decided, for
example, makes the same column of counts for every judge. The matrix is kept in the smallest integers that hold it, and
becomes floats a block of replicates at a time. Sums of whole numbers are exact, whatever their company.
The letters: B replicates, n prompts.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
BLOCK = 1 << 18  # numbers of the matrix that are floats at a time: 2 MiB


def resample_weights(n: int, replicates: int, *, seed: int) -> Array:
    """How often each of n prompts is in each replicate, float64 [B, n], rows sum to n. Same arguments, same draw."""
    return _weights(n, replicates, seed).astype(np.float64)


def resampled_sums(columns: Sequence[Array], replicates: int, *, seed: int) -> list[Array]:
    """The sum of each column [n] over the prompts of each replicate, [B] each. All columns have the same n.

    Raises ValueError for columns of several lengths.
    """
    if len({len(column) for column in columns}) > 1:
        raise ValueError(f"columns must have the same length, found {sorted({len(column) for column in columns})}")
    if not columns:
        return []
    keys = [column.tobytes() for column in columns]
    distinct = dict(zip(keys, columns, strict=True))
    weights, matrix = _weights(len(columns[0]), replicates, seed), np.stack(list(distinct.values()), axis=1)
    matrix = matrix.astype(_precision(weights, matrix))
    sums, step = np.empty((replicates, len(distinct))), max(1, BLOCK // len(columns[0]))
    for start in range(0, replicates, step):
        sums[start : start + step] = weights[start : start + step].astype(matrix.dtype) @ matrix
    by_key = dict(zip(distinct, np.ascontiguousarray(sums.T), strict=True))
    return [by_key[key] for key in keys]


def _precision(weights: NDArray[Any], matrix: Array) -> type[np.float32] | type[np.float64]:
    """float32 where every partial sum is a whole number that it holds exactly: half of the time, the same result."""
    largest = float(weights.max()) * float(np.abs(matrix).sum(axis=0).max())
    return np.float32 if largest < 2.0**24 and np.array_equal(matrix, np.rint(matrix)) else np.float64


@lru_cache(maxsize=32)  # 10 MB for 5,000 prompts and 2,000 replicates
def _weights(n: int, replicates: int, seed: int) -> NDArray[Any]:
    if n < 2:
        raise ValueError(f"a bootstrap needs at least 2 prompts, found {n}")
    if replicates < 1:
        raise ValueError(f"replicates must be at least 1, found {replicates}")
    weights = np.random.default_rng((seed, n)).multinomial(n, np.full(n, 1.0 / n), size=replicates)
    weights = weights.astype(np.min_scalar_type(int(weights.max())))
    weights.setflags(write=False)
    return weights
