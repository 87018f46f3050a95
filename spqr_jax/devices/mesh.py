"""Devices: one mesh with a `data` axis over every device of every host."""

import math
import os
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Leaves of fewer elements (norms, biases, small adapters) stay whole: splitting them would save less than it costs.
SMALL = 4096


def make() -> Mesh:
    """A mesh over all devices. Batches are split along its axis `data`, and so are parameters under `fsdp`."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))


def split_cpu(devices: int) -> None:
    """Split the CPU into this many devices. Call it before JAX uses a device. A number in XLA_FLAGS takes precedence.

    The operations of a small model are too short to be shared among cores. Whole programs side by side use them better.
    """
    if devices > 1 and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", devices)


def spec(shape: tuple[int, ...], devices: int) -> PartitionSpec:
    """The split of a leaf under `fsdp`: along the largest axis whose length the number of devices divides.

    A leaf that is small or has no such axis stays whole.
    """
    axes = [axis for axis, length in enumerate(shape) if length % devices == 0]
    if devices == 1 or not axes or math.prod(shape) < SMALL:
        return PartitionSpec()
    return PartitionSpec(*[None] * max(axes, key=lambda axis: shape[axis]), "data")


def layout(tree: Any, mesh: Mesh, *, fsdp: bool = False) -> Any:
    """The placement of parameters on the devices: a NamedSharding for every leaf. A leaf is anything with a shape.

    Leaves are whole on every device. Under `fsdp` (fully sharded data parallelism, ZeRO stage 3) `spec` splits them.
    """
    return jax.tree.map(
        lambda leaf: NamedSharding(mesh, spec(np.shape(leaf), mesh.size) if fsdp else PartitionSpec()), tree
    )


def place(tree: Any, mesh: Mesh, *, fsdp: bool = False) -> Any:
    """Parameters placed on the devices as `layout` says. Every process passes them whole."""
    return _place(tree, layout(tree, mesh, fsdp=fsdp))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Every leaf whole on every device."""
    return place(tree, mesh)


def split_over(tree: Any) -> Mesh | None:
    """The mesh that leaves of a tree are split over, or None if every leaf is whole."""
    placed = (leaf.sharding for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array))
    split = (s.mesh for s in placed if isinstance(s, NamedSharding) and not s.is_fully_replicated)
    return next((mesh for mesh in split if isinstance(mesh, Mesh)), None)


def split_batch(tree: Any, mesh: Mesh) -> Any:
    """Every leaf [B, ...] split along its first axis; B must be a multiple of the number of devices."""
    return _place(tree, jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec("data")), tree))


def rows(tree: Any, mesh: Mesh) -> Any:
    """A placement of the inputs of a step, of which some are batches: a NamedSharding for every leaf.

    A leaf is split along its first axis where the number of devices divides it, and otherwise whole.
    """
    divides = lambda shape: shape and shape[0] % mesh.size == 0  # noqa: E731
    return jax.tree.map(
        lambda leaf: NamedSharding(mesh, PartitionSpec("data") if divides(np.shape(leaf)) else PartitionSpec()), tree
    )


def place_rows(tree: Any, mesh: Mesh) -> Any:
    """The inputs of a step, placed as `rows` says."""
    return _place(tree, rows(tree, mesh))


def _place(tree: Any, shardings: Any) -> Any:
    """Place a tree. Each process sends its own devices their part."""
    if all(sharding.is_fully_addressable for sharding in jax.tree.leaves(shardings)):
        return jax.device_put(tree, shardings)

    def place_leaf(leaf, sharding: NamedSharding):
        value = np.asarray(leaf)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return jax.tree.map(place_leaf, tree, shardings)


def shapes(tree: Any, mesh: Mesh, *, fsdp: bool = False) -> Any:
    """The result of `place` as jax.ShapeDtypeStruct, for compiling. Nothing is placed on a device."""
    return _shapes(tree, layout(tree, mesh, fsdp=fsdp))


def row_shapes(tree: Any, mesh: Mesh) -> Any:
    """The result of `place_rows` as jax.ShapeDtypeStruct, for compiling."""
    return _shapes(tree, rows(tree, mesh))


def _shapes(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, shardings
    )


def batch_shapes(tree: Any, mesh: Mesh) -> Any:
    """The result of `split_batch` as jax.ShapeDtypeStruct, for compiling."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def bytes_each(tree: Any) -> int:
    """Bytes that a tree of arrays or shapes takes on each device of its mesh."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
    )


def constrain(tree: Any, mesh: Mesh, *, fsdp: bool) -> Any:
    """Inside a compiled program: the tree, placed as `layout` says. With fsdp False split leaves are gathered here."""
    return jax.lax.with_sharding_constraint(tree, layout(tree, mesh, fsdp=fsdp))


def each_turn(tree: Any, turn: Any) -> Any:
    """Inside a compiled loop: the tree, tied to a value `turn` that the loop changes.

    Without the tie, the compiler could gather all leaves before the loop, and all would be whole at once.
    """
    return jax.lax.optimization_barrier((tree, turn))[0]


def to_host(tree: Any) -> Any:
    """Every leaf as a whole NumPy array, on every process. If a leaf is split over processes, all must call this."""

    def fetch(x):
        if getattr(x, "is_fully_addressable", True):
            return np.asarray(x)
        if x.is_fully_replicated:
            return np.asarray(x.addressable_data(0))
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(fetch, tree)


def round_up(batch: int, mesh: Mesh) -> int:
    """`batch`, rounded up to a multiple of the number of devices."""
    return -(-batch // mesh.size) * mesh.size


def pad_batch(array: np.ndarray, size: int) -> np.ndarray:
    """The array [N, ...] with its last row repeated up to `size` rows, so that all batches run the same program."""
    array = np.asarray(array)
    return np.concatenate([array, np.repeat(array[-1:], size - len(array), axis=0)]) if len(array) < size else array
