"""The noise that pictures start from: a function of each one's seed, whatever the batch or the number of devices."""

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np

from spqr_jax import torch_noise

Rows = Callable[[slice], np.ndarray]  # numbers of pictures -> their noise [n, h, w, C], so that a sweep never holds all


def of_seeds(seeds: Sequence[int] | int, count: int, shape: tuple[int, int, int], kind: str = "jax") -> Rows:
    """Standard normal noise of `count` pictures of latent `shape` [h, w, C].

    seeds: one a picture, in 0..2**32-1; or one, then picture i uses fold_in(key(seed), i). kind: "jax", or "torch" for
    the noise of torch.Generator("cpu").manual_seed(seed). Raises ValueError for what does not fit.
    """
    if kind not in ("jax", "torch"):
        raise ValueError(f'noise must be "jax" or "torch", found {kind!r}.')
    if isinstance(seeds, (int, np.integer)):
        if kind == "torch":
            raise ValueError('noise="torch" needs one seed a picture: torch has no rule for folding an index in.')
        key = jax.random.key(_checked([int(seeds)])[0])
        return lambda rows: np.stack(
            [jax.random.normal(jax.random.fold_in(key, i), shape) for i in range(rows.start, rows.stop)]
        )
    values = _checked(seeds)
    if len(values) != count:
        raise ValueError(f"seeds: expected {count} (one a prompt), found {len(values)}.")
    if kind == "jax":
        return lambda rows: from_seeds(values[rows], shape)
    height, width, channels = shape
    return lambda rows: np.concatenate(
        [torch_noise.torch_randn(int(seed), (1, channels, height, width)) for seed in values[rows]]
    ).transpose(0, 2, 3, 1)


def given(latents: np.ndarray, count: int, shape: tuple[int, int, int]) -> Rows:
    """The caller's noise [count, *shape]; raises ValueError for another shape."""
    if np.shape(latents) != (count, *shape):
        raise ValueError(f"latents must have shape {(count, *shape)}, found {np.shape(latents)}.")
    return lambda rows: np.asarray(latents)[rows]


def from_seeds(seeds: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal noise [N, *shape]: row i depends on seeds[i] alone."""
    return np.asarray(_normal(np.asarray(seeds, np.uint32), shape))


@functools.partial(jax.jit, static_argnums=1)
def _normal(seeds: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape))(seeds)


def _checked(seeds: Sequence[int]) -> np.ndarray:
    for seed in seeds:
        if not 0 <= int(seed) < 2**32:
            raise ValueError(f"seed {seed} is outside 0..{2**32 - 1}.")
    return np.asarray([int(seed) for seed in seeds], np.uint32)
