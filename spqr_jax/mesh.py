"""Devices: one mesh with a `data` axis over every device of every host."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make() -> Mesh:
    """A mesh over all devices; batches are split along `data`, parameters are replicated."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicate(tree, mesh: Mesh):
    """Every leaf whole on every device."""
    return _place(tree, NamedSharding(mesh, PartitionSpec()))


def split_batch(tree, mesh: Mesh):
    """Every leaf [B, ...] split along its first axis; B must be a multiple of the number of devices."""
    return _place(tree, NamedSharding(mesh, PartitionSpec("data")))


def _place(tree: Any, sharding: NamedSharding) -> Any:
    """Leaves that every process holds whole, on the devices; each process sends its own devices their part."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def place(leaf):
        value = np.asarray(leaf)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return jax.tree.map(place, tree)


def to_host(tree: Any) -> Any:
    """Every leaf whole as NumPy, on every process; a collective when a leaf is split over processes."""

    def fetch(x):
        if getattr(x, "is_fully_addressable", True):
            return np.asarray(x)
        if x.is_fully_replicated:
            return np.asarray(x.addressable_data(0))
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(fetch, tree)


def round_up(batch: int, mesh: Mesh) -> int:
    """The next multiple of the number of devices."""
    return -(-batch // mesh.size) * mesh.size


def pad_batch(array: np.ndarray, size: int) -> np.ndarray:
    """Repeat the last row until the batch holds `size` rows, so that every batch runs the same compiled program."""
    array = np.asarray(array)
    return np.concatenate([array, np.repeat(array[-1:], size - len(array), axis=0)]) if len(array) < size else array
