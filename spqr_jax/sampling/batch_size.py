"""Batch sizes: the largest that fits, by the compiled program's own account of its memory."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from spqr_jax.devices import processes
from spqr_jax.files import storage

# Latent pixels that fill a device in one batch: 16 pictures of 512x512. Guided, the UNet's widest products then have
# 131,072 rows and its narrowest 2,048, enough for every unit of a large accelerator: more pictures take longer in
# proportion. Of small pictures 64, for what a step costs beside its arithmetic is then shared by as many.
LATENTS_PER_BATCH = 16 * 64 * 64
MAX_BATCH = 64

# Share of a device's memory that one program may take: the rest is for the next batch, waiting, and for fragmentation.
SHARE = 0.9
MIB = 2**20


def worthwhile(latent_pixels: int, mesh: Mesh) -> int:
    """Pictures a device beyond which bigger batches stop paying; latent_pixels: of one picture. Devices that a CPU is
    split into count as one."""
    parts = len(mesh.local_devices) if mesh.local_devices[0].platform == "cpu" else 1
    return -(-max(1, min(MAX_BATCH, LATENTS_PER_BATCH // latent_pixels)) // parts)


def memory_limit(mesh: Mesh, *, beside: bool = False) -> int | None:
    """Bytes that one program may take on each device, the same on every process; None where the device does not say.

    beside: beside what the device holds now. On a CPU: half of the machine's memory, shared by its devices.
    """
    device = mesh.local_devices[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        limit = int(SHARE * stats["bytes_limit"]) - beside * stats.get("bytes_in_use", 0)
    elif device.platform == "cpu":
        limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (2 * len(mesh.local_devices))
    else:
        return None
    # In MiB: what processes agree on has 32 bits.
    return int(processes.agreed(np.array(max(limit, 0) // MIB, np.int32))) * MIB


def program_bytes(compiled: Any) -> int:
    """Bytes on each device that a jax.stages.Compiled takes while it runs: arguments, results, all between."""
    memory = compiled.memory_analysis()
    if memory is None:  # a backend without the analysis
        return 0
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return used - memory.alias_size_in_bytes


def largest(
    compiled: Callable[[int], Any], most: int, *, weights: int, limit: int | None, what: str = "generation"
) -> int:
    """The first of most, most / 2, ..., 1 pictures a device whose program fits.

    compiled: pictures a device -> compiled program. A program takes its weights, maybe something constant, and so much
    a picture: from one that does not fit follows a bound for the smaller ones, and those that cannot fit are not
    compiled. When `most` fits, its program is the only one.
    weights: bytes of the weights on each device; limit: bytes there, None: unknown, then `most` is taken untested.
    Raises MemoryError naming `what`, bytes and remedies when one picture a device does not fit.
    """
    if limit is None:
        return most
    size = most
    while (needed := _needed(compiled, size)) is None or needed > limit:
        if size == 1:
            raise MemoryError(_too_big(what, needed, weights, limit))
        logging.info("%s: %d pictures a device take %s of %s.", what, size, _gigabytes(needed), _gigabytes(limit))
        size = _smaller(size, needed, weights, limit)
    return size


def _needed(compiled: Callable[[int], Any], size: int) -> int | None:
    """Bytes of the program for `size` pictures; None when the compiler itself finds that it cannot fit (TPU)."""
    try:
        return program_bytes(compiled(size))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


def _smaller(size: int, needed: int | None, weights: int, limit: int) -> int:
    """The next size to try: the first half, quarter, ... that fits if all but the weights shrinks with the batch."""
    smaller = size // 2
    while needed is not None and smaller > 1 and weights + (needed - weights) * smaller / size > limit:
        smaller //= 2
    return smaller


def _gigabytes(value: int | None) -> str:
    return "more than there is" if value is None else f"{value / 1e9:.3g} GB"


def _too_big(what: str, needed: int | None, weights: int, limit: int) -> str:
    return (
        f"{what}: one picture a device takes {_gigabytes(needed)} (weights {_gigabytes(weights)}), a device has "
        f"{_gigabytes(limit)} for it; split the weights over several devices (mesh.fsdp), use bfloat16 (dtype), or "
        "make smaller pictures (generation.height, generation.width)."
    )


def remembered(file: Path, key: str, choose: Callable[[], int]) -> int:
    """The batch size under `key` in a JSON file, on every process; `choose()` decides what is not there, and is kept.

    Work is cut into batches by it, so a run that is continued must not choose anew. Jobs that share the file may write
    it at once: a size that is lost so is chosen again, from the same memory.
    """
    known = int(processes.agreed(np.array(_read(file).get(key, 0) if processes.first() else 0, np.int32)))
    if known:
        return known
    chosen = choose()
    if processes.first():
        storage.write_text(file, json.dumps(_read(file) | {key: chosen}, indent=2, sort_keys=True) + "\n")
    return chosen


def _read(file: Path) -> dict[str, int]:
    """What a file holds; a damaged one is named and set aside."""
    if not file.exists():
        return {}
    try:
        sizes = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(sizes, dict) or not all(type(n) is int and n > 0 for n in sizes.values()):
            raise ValueError("expected names with whole numbers above 0")
    except ValueError as error:
        storage.set_aside(file, str(error))
        return {}
    return sizes
