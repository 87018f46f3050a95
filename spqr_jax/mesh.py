"""Devices: one mesh with a `data` axis over every device of every host."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make() -> Mesh:
    """A mesh over all devices; batches are split along `data`, parameters are replicated."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def replicate(tree, mesh: Mesh):
    """Every leaf whole on every device."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def split_batch(tree, mesh: Mesh):
    """Every leaf [B, ...] split along its first axis; B must be a multiple of the number of devices."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec("data")))


def round_up(batch: int, mesh: Mesh) -> int:
    """The next multiple of the number of devices."""
    return -(-batch // mesh.size) * mesh.size


def pad_batch(array: np.ndarray, size: int) -> np.ndarray:
    """Repeat the last row until the batch holds `size` rows, so that every batch runs the same compiled program."""
    array = np.asarray(array)
    return np.concatenate([array, np.repeat(array[-1:], size - len(array), axis=0)]) if len(array) < size else array
