"""Batch sizes: the largest batch whose compiled program fits into the memory of the devices."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from spqr_jax.devices import memory
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


def even(count: int, most: int) -> int:
    """The smallest batch size that makes `count` images in as few batches as the size `most`.

    The last batch is padded, so 200 images in batches of 64 would take the time of 256. In batches of 50 they take 200.
    """
    return -(-count // -(-count // most))


def largest(
    compiled: Callable[[int], Any], most: int, *, weights: int, limit: int | None, what: str = "generation"
) -> int:
    """`spqr_jax.devices.memory.largest` for sampling, with the remedies that a config has."""
    return memory.largest(
        compiled,
        most,
        weights=weights,
        limit=limit,
        what=what,
        smallest=f"{what}: one image on each device",
        remedies="split the weights over several devices (mesh.fsdp), use bfloat16 (dtype), or make smaller images "
        "(generation.height, generation.width)",
    )


def remembered(file: Path, key: str, choose: Callable[[], int]) -> int:
    """The batch size under `key` in a JSON file, the same on every process. `choose()` gives a missing one.

    Work is cut into batches of this size, so a continued run must use the same size again (`spqr_jax.files.choices`).
    """
    return choices.remembered(file, key, choose, form=1)
