"""The noise that images start from. It depends on the seed of each image, not on the batch or the number of devices."""

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from spqr_jax.devices import mesh as mesh_lib
from spqr_jax.sampling import torch_noise

# (numbers of images, B) -> their noise [B, h, w, C], split over the devices. If there are fewer than B images, the last
# row is repeated. Noise is drawn batch by batch, because the noise of a whole sweep would not fit into memory.
Batches = Callable[[slice, int], jax.Array]


def of_seeds(seeds: Sequence[int] | int, count: int, shape: tuple[int, int, int], mesh: Mesh, kind: str) -> Batches:
    """Standard normal noise of `count` images of latent `shape` [h, w, C].

    seeds: one for each image, in 0..2**32-1; or a single seed, then image i uses fold_in(key(seed), i). kind: "jax", or
    "torch" for the noise of torch.Generator("cpu").manual_seed(seed). Raises ValueError for another kind, number of
    seeds, or range.
    """
    if kind not in ("jax", "torch"):
        raise ValueError(f'noise must be "jax" or "torch", found {kind!r}.')
    if isinstance(seeds, (int, np.integer)):
        if kind == "torch":
            raise ValueError('noise="torch" needs one seed for each image: torch has no rule for folding an index in.')
        seed, numbers = _checked([int(seeds)])[0], np.arange(count, dtype=np.uint32)
        return lambda rows, size: of_numbers(seed, _split(numbers[rows], size, mesh), shape)
    values = _checked(seeds)
    if len(values) != count:
        raise ValueError(f"seeds: expected {count} (one a prompt), found {len(values)}.")
    if kind == "jax":
        return lambda rows, size: of_each(_split(values[rows], size, mesh), shape)
    height, width, channels = shape

    def drawn(rows: slice, size: int) -> jax.Array:
        noise = [torch_noise.torch_randn(int(seed), (1, channels, height, width)) for seed in values[rows]]
        return _split(np.concatenate(noise).transpose(0, 2, 3, 1), size, mesh)

    return drawn


def given(latents: np.ndarray, count: int, shape: tuple[int, int, int], mesh: Mesh) -> Batches:
    """The noise `latents` [count, *shape] of the caller. Raises ValueError for another shape."""
    if np.shape(latents) != (count, *shape):
        raise ValueError(f"latents must have shape {(count, *shape)}, found {np.shape(latents)}.")
    return lambda rows, size: _split(np.asarray(latents)[rows], size, mesh)


@functools.partial(jax.jit, static_argnums=1)
def of_each(seeds: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal noise [N, *shape] of uint32 seeds [N]: row i depends on seeds[i] alone."""
    return jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape))(seeds)


@functools.partial(jax.jit, static_argnums=2)
def of_numbers(seed: jax.Array, numbers: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    key = jax.random.key(seed)
    return jax.vmap(lambda number: jax.random.normal(jax.random.fold_in(key, number), shape))(numbers)


def _split(values: np.ndarray, size: int, mesh: Mesh) -> jax.Array:
    return mesh_lib.split_batch(mesh_lib.pad_batch(values, size), mesh)


def _checked(seeds: Sequence[int]) -> np.ndarray:
    for seed in seeds:
        if not 0 <= int(seed) < 2**32:
            raise ValueError(f"seed {seed} is outside 0..{2**32 - 1}.")
    return np.asarray([int(seed) for seed in seeds], np.uint32)
