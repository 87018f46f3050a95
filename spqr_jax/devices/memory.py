"""Memory of the devices: the bytes that one program may take, and the bytes that a compiled program takes."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
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


def needed_bytes(compiled: Callable[[], Any]) -> int | None:
    """Bytes of the program that `compiled` compiles; None if the compiler itself finds that they cannot fit (TPU)."""
    try:
        return program_bytes(compiled())
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


def gigabytes(value: int | None) -> str:
    """A number of bytes for a message; None: what `needed_bytes` could not tell."""
    return "more than there is" if value is None else f"{value / 1e9:.3g} GB"
