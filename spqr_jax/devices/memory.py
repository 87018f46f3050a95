"""Memory of the devices: the bytes that one program may take, and the bytes that a compiled program takes."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from spqr_jax.devices import processes

# Share of a device's memory that one program may take. The rest is for the next batch, which waits, and for gaps.
SHARE = 0.9
MIB = 2**20


def memory_limit(mesh: Mesh, *, beside: bool = False) -> int | None:
    """Bytes that one program may take on each device, the same number on every process.

    On a CPU it is half of the machine's memory, divided among its devices. None if a device does not report its memory.
    beside: subtract the memory that is in use now.
    """
    limit = limit_here(mesh.local_devices, beside=beside)
    if limit is None:
        return None
    # In MiB, since the number that processes agree on has 32 bits.
    return int(processes.agreed(np.array(limit // MIB, np.int32))) * MIB


def limit_here(devices: Sequence[Any], *, beside: bool = False) -> int | None:
    """As `memory_limit`, for the devices of this process, which asks no other."""
    stats = devices[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return max(0, int(SHARE * stats["bytes_limit"]) - beside * stats.get("bytes_in_use", 0))
    if devices[0].platform == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (2 * len(devices))
    return None


def program_bytes(compiled: Any) -> int:
    """Bytes on each device that a jax.stages.Compiled takes while it runs: arguments, results and temporary arrays."""
    memory = compiled.memory_analysis()
    if memory is None:  # a backend without the analysis
        return 0
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return used - memory.alias_size_in_bytes


def needed_bytes(compiled: Callable[..., Any], *arguments: Any) -> int | None:
    """Bytes of the program that compiled(*arguments) gives; None if the compiler itself finds no room for it (TPU)."""
    try:
        return program_bytes(compiled(*arguments))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


def largest(
    compiled: Callable[[int], Any],
    most: int,
    *,
    weights: int,
    limit: int | None,
    what: str,
    smallest: str,
    remedies: str,
) -> int:
    """The first number among most, most / 2, ..., 1 of images on each device whose program fits.

    compiled: number of images on each device -> compiled program. The memory of a program is at least that of its
    weights, plus a share that grows with the batch. So the size of a program that does not fit gives a bound for
    smaller batches, and batches that cannot fit are not compiled. If `most` fits, no other program is compiled.
    weights: bytes of the weights on each device. limit: bytes that are there; if it is None, `most` is taken untested.
    what: the work in the log. Raises MemoryError if one image on each device does not fit: `smallest` takes so many
    bytes, and the `remedies`.
    """
    if limit is None:
        return most
    size = most
    while (needed := needed_bytes(compiled, size)) is None or needed > limit:
        if size == 1:
            raise MemoryError(
                f"{smallest} takes {gigabytes(needed)} (weights {gigabytes(weights)}), a device has "
                f"{gigabytes(limit)} for it; {remedies}."
            )
        logging.info("%s: %d images on each device take %s of %s.", what, size, gigabytes(needed), gigabytes(limit))
        size = _smaller(size, needed, weights, limit)
    return size


def _smaller(size: int, needed: int | None, weights: int, limit: int) -> int:
    """The next size to try: the first of size / 2, size / 4, ... that can fit.

    It is assumed that all memory except that of the weights shrinks with the batch.
    """
    smaller = size // 2
    while needed is not None and smaller > 1 and weights + (needed - weights) * smaller / size > limit:
        smaller //= 2
    return smaller


def gigabytes(value: int | None) -> str:
    """A number of bytes for a message; None: what `needed_bytes` could not tell."""
    return "more than there is" if value is None else f"{value / 1e9:.3g} GB"
