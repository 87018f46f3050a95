"""Batch sizes: the largest batch whose compiled program fits into the memory of the devices."""

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

# Latent pixels that fill a device in one batch: those of 16 images of 512x512. With guidance, the widest matrix
# products of the UNet then have 131,072 rows and the narrowest 2,048. That is enough for every unit of a large
# accelerator, so the time of a larger batch grows in proportion. A batch holds at most 64 small images: beyond that,
# the fixed cost of a step is shared by enough images.
LATENTS_PER_BATCH = 16 * 64 * 64
MAX_BATCH = 64

# Share of a device's memory that one program may take. The rest is for the next batch, which waits, and for gaps.
SHARE = 0.9
MIB = 2**20


def worthwhile(latent_pixels: int, mesh: Mesh) -> int:
    """Images on each device beyond which a larger batch saves no time. latent_pixels: latent pixels of one image.

    The devices that a CPU is split into count as one.
    """
    parts = len(mesh.local_devices) if mesh.local_devices[0].platform == "cpu" else 1
    return -(-max(1, min(MAX_BATCH, LATENTS_PER_BATCH // latent_pixels)) // parts)


def memory_limit(mesh: Mesh, *, beside: bool = False) -> int | None:
    """Bytes that one program may take on each device, the same number on every process.

    On a CPU it is half of the machine's memory, divided among its devices. None if a device does not report its memory.
    beside: subtract the memory that is in use now.
    """
    device = mesh.local_devices[0]
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        limit = int(SHARE * stats["bytes_limit"]) - beside * stats.get("bytes_in_use", 0)
    elif device.platform == "cpu":
        limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (2 * len(mesh.local_devices))
    else:
        return None
    # In MiB, since the number that processes agree on has 32 bits.
    return int(processes.agreed(np.array(max(limit, 0) // MIB, np.int32))) * MIB


def program_bytes(compiled: Any) -> int:
    """Bytes on each device that a jax.stages.Compiled takes while it runs: arguments, results and temporary arrays."""
    memory = compiled.memory_analysis()
    if memory is None:  # a backend without the analysis
        return 0
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return used - memory.alias_size_in_bytes


def largest(
    compiled: Callable[[int], Any], most: int, *, weights: int, limit: int | None, what: str = "generation"
) -> int:
    """The first number among most, most / 2, ..., 1 of images on each device whose program fits.

    compiled: number of images on each device -> compiled program. The memory of a program is at least that of its
    weights, plus a share that grows with the batch. So the size of a program that does not fit gives a bound for
    smaller batches, and batches that cannot fit are not compiled. If `most` fits, no other program is compiled.
    weights: bytes of the weights on each device. limit: bytes that are there; if it is None, `most` is taken untested.
    Raises MemoryError that names `what`, the bytes and the remedies if one image on each device does not fit.
    """
    if limit is None:
        return most
    size = most
    while (needed := needed_bytes(compiled, size)) is None or needed > limit:
        if size == 1:
            raise MemoryError(_too_big(what, needed, weights, limit))
        logging.info("%s: %d images on each device take %s of %s.", what, size, _gigabytes(needed), _gigabytes(limit))
        size = _smaller(size, needed, weights, limit)
    return size


def needed_bytes(compiled: Callable[[int], Any], size: int) -> int | None:
    """Bytes of the program for `size` images; None if the compiler itself finds that they cannot fit (TPU)."""
    try:
        return program_bytes(compiled(size))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


def _smaller(size: int, needed: int | None, weights: int, limit: int) -> int:
    """The next size to try: the first of size / 2, size / 4, ... that can fit.

    It is assumed that all memory except that of the weights shrinks with the batch.
    """
    smaller = size // 2
    while needed is not None and smaller > 1 and weights + (needed - weights) * smaller / size > limit:
        smaller //= 2
    return smaller


def _gigabytes(value: int | None) -> str:
    return "more than there is" if value is None else f"{value / 1e9:.3g} GB"


def _too_big(what: str, needed: int | None, weights: int, limit: int) -> str:
    return (
        f"{what}: one image on each device takes {_gigabytes(needed)} (weights {_gigabytes(weights)}), a device has "
        f"{_gigabytes(limit)} for it; split the weights over several devices (mesh.fsdp), use bfloat16 (dtype), or "
        "make smaller images (generation.height, generation.width)."
    )


def remembered(file: Path, key: str, choose: Callable[[], int]) -> int:
    """The batch size under `key` in a JSON file, the same on every process. `choose()` gives a missing one.

    Work is cut into batches of this size, so a continued run must use the same size again. Several jobs may share the
    file and write it at the same time. A size that is lost in this way is chosen again, with the same result on devices
    with the same memory.
    """
    known = int(processes.agreed(np.array(_read(file).get(key, 0) if processes.first() else 0, np.int32)))
    if known:
        return known
    chosen = choose()
    if processes.first():
        storage.write_text(file, json.dumps(_read(file) | {key: chosen}, indent=2, sort_keys=True) + "\n")
    return chosen


def _read(file: Path) -> dict[str, int]:
    """The batch sizes in a file. A damaged file is named in the log and set aside."""
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
