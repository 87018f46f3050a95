"""Batch sizes: the largest batch whose compiled program fits into the memory of the devices."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import logging
from jax.sharding import Mesh

from spqr_jax.devices import memory
from spqr_jax.devices.memory import SHARE as SHARE
from spqr_jax.devices.memory import gigabytes
from spqr_jax.devices.memory import memory_limit as memory_limit
from spqr_jax.devices.memory import program_bytes as program_bytes
from spqr_jax.files import choices

# Latent pixels that fill a device in one batch: those of 16 images of 512x512. With guidance, the widest matrix
# products of the UNet then have 131,072 rows and the narrowest 2,048. That is enough for every unit of a large
# accelerator, so the time of a larger batch grows in proportion. A batch holds at most 64 small images: beyond that,
# the fixed cost of a step is shared by enough images.
LATENTS_PER_BATCH = 16 * 64 * 64
MAX_BATCH = 64


def worthwhile(latent_pixels: int, mesh: Mesh) -> int:
    """Images on each device beyond which a larger batch saves no time. latent_pixels: latent pixels of one image.

    The devices that a CPU is split into count as one.
    """
    parts = len(mesh.local_devices) if mesh.local_devices[0].platform == "cpu" else 1
    return -(-max(1, min(MAX_BATCH, LATENTS_PER_BATCH // latent_pixels)) // parts)


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
        logging.info("%s: %d images on each device take %s of %s.", what, size, gigabytes(needed), gigabytes(limit))
        size = _smaller(size, needed, weights, limit)
    return size


def needed_bytes(compiled: Callable[[int], Any], size: int) -> int | None:
    """Bytes of the program for `size` images; None if the compiler itself finds that they cannot fit (TPU)."""
    return memory.needed_bytes(lambda: compiled(size))


def _smaller(size: int, needed: int | None, weights: int, limit: int) -> int:
    """The next size to try: the first of size / 2, size / 4, ... that can fit.

    It is assumed that all memory except that of the weights shrinks with the batch.
    """
    smaller = size // 2
    while needed is not None and smaller > 1 and weights + (needed - weights) * smaller / size > limit:
        smaller //= 2
    return smaller


def _too_big(what: str, needed: int | None, weights: int, limit: int) -> str:
    return (
        f"{what}: one image on each device takes {gigabytes(needed)} (weights {gigabytes(weights)}), a device has "
        f"{gigabytes(limit)} for it; split the weights over several devices (mesh.fsdp), use bfloat16 (dtype), or "
        "make smaller images (generation.height, generation.width)."
    )


def remembered(file: Path, key: str, choose: Callable[[], int]) -> int:
    """The batch size under `key` in a JSON file, the same on every process. `choose()` gives a missing one.

    Work is cut into batches of this size, so a continued run must use the same size again (`spqr_jax.files.choices`).
    """
    return choices.remembered(file, key, choose, form=1)
