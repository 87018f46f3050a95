"""PyTorch's CPU normal noise from NumPy alone, so that prompt files with seeds reproduce published PyTorch runs.

`torch_randn(seed, shape)` gives the numbers of `torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))`
in float32: the same Mersenne twister words, the same pairing into Box-Muller samples. PyTorch has two paths: 16 values
or more are drawn in blocks of 16 from 24-bit uniforms, fewer one pair at a time from 53-bit uniforms.

The block path repeats the arithmetic of PyTorch's AVX2 kernel (any x86 machine of the last decade). Only the last bit
of log, sin and cos may differ, by at most 5e-7. PyTorch's scalar kernel rounds the angle differently, and differs from
its AVX2 kernel by up to 2.5e-6. Runs on other processors agree within that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_BLOCK = 16  # PyTorch fills this many values at a time: 8 radii, then 8 angles


def torch_randn(seed: int, shape: int | Sequence[int]) -> np.ndarray:
    """Standard normal float32 array of `shape`, as PyTorch's CPU generator gives it right after manual_seed(seed).

    seed: -2**63..2**64-1, as in torch.manual_seed; the twister uses its low 32 bits. shape: in PyTorch's order, which
    is [1, 4, H/8, W/8] for Stable Diffusion latents. Raises ValueError for a seed or shape out of range.
    """
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed={seed} is outside torch.manual_seed's range -2**63..2**64-1")
    dims = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
    if any(dim < 0 for dim in dims):
        raise ValueError(f"shape={dims} has a negative dimension")
    size = math.prod(dims)
    fill = _blocks if size >= _BLOCK else _pairs
    # RandomState seeds the twister with init_genrand, as PyTorch does; default_rng and a sequence seed do not.
    return fill(np.random.RandomState(seed & 0xFFFFFFFF), size).reshape(dims)


def _words(twister: np.random.RandomState, count: int) -> np.ndarray:
    """The next `count` outputs of the twister, uint32 [count]."""
    return np.frombuffer(twister.bytes(4 * count), "<u4")


def _blocks(twister: np.random.RandomState, size: int) -> np.ndarray:
    """float32 [size], size >= 16. A ragged end is drawn again: the last 16 values are a fresh block."""
    uniform = _uniform24(_words(twister, size))
    whole = size - size % _BLOCK
    if whole == size:
        return _box_muller(uniform)
    tail = _box_muller(_uniform24(_words(twister, _BLOCK)))
    return np.concatenate([_box_muller(uniform[:whole])[: size - _BLOCK], tail])


def _uniform24(words: np.ndarray) -> np.ndarray:
    """float32 in [0, 1) from the low 24 bits."""
    return (words & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)


def _box_muller(uniform: np.ndarray) -> np.ndarray:
    """float32 [16 k] -> float32 [16 k], in float32 throughout: the rounding of the angle shows at 1e-6."""
    radius_u, angle_u = np.moveaxis(uniform.reshape(-1, 2, _BLOCK // 2), 1, 0)
    radius = np.sqrt(np.float32(-2) * np.log(1 - radius_u))
    angle = np.float32(2 * np.pi) * angle_u
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)


def _pairs(twister: np.random.RandomState, size: int) -> np.ndarray:
    """float32 [size], size < 16: cosine then sine of each pair, in float64; the sine left over is dropped."""
    words = _words(twister, 4 * ((size + 1) // 2)).astype(np.uint64).reshape(-1, 2, 2)
    long = (words[..., 0] << np.uint64(32)) | words[..., 1]  # the first word is the high half
    angle_u, radius_u = ((long & np.uint64(2**53 - 1)).astype(np.float64) * 2.0**-53).T
    radius = np.sqrt(-2 * np.log1p(-radius_u))
    angle = 2 * np.pi * angle_u
    samples = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return samples.reshape(-1)[:size].astype(np.float32)
