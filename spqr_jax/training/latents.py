"""The latents of a data set: the VAE encodes an image once for each crop, and training draws from the distributions."""

import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from spqr_jax import backbones
from spqr_jax import params as params_lib
from spqr_jax.backbones import Backbone
from spqr_jax.data import Batch, Dataset
from spqr_jax.devices import memory, processes
from spqr_jax.devices import mesh as mesh_lib
from spqr_jax.files import storage
from spqr_jax.params import Definition, Params
from spqr_jax.pipeline import Pipeline

# Images encoded at once: at most 64, and with at most the pixels of 4 images of 512x512 (about 2 KiB a pixel).
ENCODE_PIXELS, ENCODE_BATCH = 4 * 512 * 512, 64
# Rows in a block of a pass, rounded down to whole batches: 32 MiB at 512x512.
BLOCK_ROWS = 256


class Latents(NamedTuple):
    """Mean and log-variance of the latents of N images, float32 [N, h, w, C] each, before scaling."""

    mean: np.ndarray
    logvar: np.ndarray

    def scaled(self, pipeline: Pipeline) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the scaled latents, which the denoiser sees: float32 [N, h, w, C] each."""
        backbone = backbones.of(pipeline)
        return backbone.scaled(self.mean, self.logvar, backbone.scaling(pipeline))

    def rows(self, index: Any) -> "Latents":
        """The rows that a NumPy index chooses."""
        return Latents(self.mean[index], self.logvar[index])


class Encoded:
    """The latents of a data set for the batches of a training, whose rows may belong to several passes over the data.

    Where all passes are the same, the images are encoded once, at the start, by `encode`. Where crops or flips change,
    a pass is encoded in blocks of BLOCK_ROWS rows: a block when a batch first needs one of its rows. It stays in memory
    until the last batch that needs it. A block is always encoded in the same way, so its latents are the same to the
    bit whether a run encodes it, reads it from the cache, or is resumed in the middle.

    order: the batch of each step. cache: a directory in which blocks are kept for other subjects and profiles, under
    a hash of data set, VAE and size, the number of the pass, and their rows. Raises ValueError as `encode`.

    Attributes:
        size: height and width of the images in pixels.
    """

    def __init__(self, pipeline: Pipeline, dataset: Dataset, order: Sequence[Batch], *, cache: Path | None = None):
        self.size = checked_size(pipeline, dataset)
        self._pipeline, self._dataset, self._order, self._cache = pipeline, dataset, order, cache
        self._changes = dataset.at_pass is not None
        batch = images_at_once(len(dataset), self.size)
        self._length = BLOCK_ROWS // batch * batch if self._changes else len(dataset)
        self._key = _key(pipeline, dataset, self.size) if cache is not None and self._changes else ""
        self._last_use = {place: step for step, batch in enumerate(order) for place in self._places(*batch)}
        self._blocks = {} if self._changes else {(0, 0): encode(pipeline, dataset, cache=cache)}

    def batch(self, step: int) -> Latents:
        """The latents of the batch of a step, from 0: float32 [B, h, w, C] each."""
        rows, places = self._order[step].rows, self._places(*self._order[step])
        for place in dict.fromkeys(places):
            if place not in self._blocks:
                self._blocks[place] = self._block(*place)
        chosen = [self._blocks[place].rows(row) for place, row in zip(places, rows % self._length, strict=True)]
        self._blocks = {place: block for place, block in self._blocks.items() if self._last_use[place] > step}
        return Latents(*(np.stack(field) for field in zip(*chosen, strict=True)))

    def _places(self, rows: np.ndarray, passes: np.ndarray) -> list[tuple[int, int]]:
        """(pass, number of the block in it) of each row."""
        return list(zip((passes * self._changes).tolist(), (rows // self._length).tolist(), strict=True))

    def _block(self, number: int, block: int) -> Latents:
        rows = range(len(self._dataset))[block * self._length : (block + 1) * self._length]
        name = f"{self._key}-pass-{number}-rows-{rows.start}-{rows.stop}.npz"
        file = None if self._cache is None else self._cache / name
        seen = self._dataset.of_pass(number)
        return _kept(file, lambda: _encode_rows(self._pipeline, seen, rows, self.size))


def encode(pipeline: Pipeline, dataset: Dataset, *, cache: Path | None = None, limit: int | None = None) -> Latents:
    """The latents of every image, in the first pass if passes differ.

    cache: a directory in which they are kept under a hash of data set, VAE and size, so that a sweep encodes each data
    set once. limit: bytes that the encoder may take (default: as the device says, `spqr_jax.devices.memory`). Raises
    ValueError if a side of the images is no multiple of the VAE's factor, MemoryError if not one image fits.
    """
    size, rows = checked_size(pipeline, dataset), range(len(dataset))
    file = None if cache is None else cache / f"{_key(pipeline, dataset, size)}.npz"
    return _kept(file, lambda: _encode_rows(pipeline, dataset, rows, size, limit))


def images_at_once(count: int, size: tuple[int, int]) -> int:
    """Images encoded at once, of a data set of `count` images."""
    return max(1, min(ENCODE_BATCH, ENCODE_PIXELS // (size[0] * size[1]), count))


def _encode_rows(
    pipeline: Pipeline, dataset: Dataset, rows: range, size: tuple[int, int], limit: int | None = None
) -> Latents:
    """The latents of some images of `size` pixels: `images_at_once`, or fewer if so many do not fit."""
    batch = images_at_once(len(dataset), size)
    backbone, means, logvars = backbones.of(pipeline), [], []
    definition = pipeline.definitions[backbone.autoencoder]
    params = jax.device_put(pipeline.params[backbone.autoencoder])  # once, and not with every batch
    if limit := limit or memory.limit_here(jax.local_devices()):
        batch = _at_once(backbone, definition, params, (batch, *size, 3), limit)
    for start in rows[::batch]:
        chosen = np.arange(start, min(start + batch, rows.stop))
        images = mesh_lib.pad_batch(dataset.images(chosen), batch)
        mean, logvar = encode_batch(backbone, definition, params, images)
        means.append(np.asarray(mean, np.float32)[: len(chosen)])
        logvars.append(np.asarray(logvar, np.float32)[: len(chosen)])
    return Latents(np.concatenate(means), np.concatenate(logvars))


def _kept(file: Path | None, make: Callable[[], Latents]) -> Latents:
    """The latents in `file`, else those that `make` gives, which the first process writes there."""
    if file is not None and file.exists():
        stored = storage.read_npz(file)
        return Latents(stored["mean"], stored["logvar"])
    made = make()
    if file is not None and processes.first():
        storage.write_npz(file, **made._asdict())
    return made


@functools.partial(jax.jit, static_argnums=(0, 1))
def encode_batch(backbone: Backbone, definition: Definition, params: Params, images_u8: jax.Array):
    """images_u8 [B, H, W, 3] -> mean and log-variance [B, h, w, C]."""
    return backbone.encode(definition.bind(params), images_u8)


_lower = encode_batch.lower


def _at_once(backbone: Backbone, definition: Definition, params: Params, most: tuple[int, ...], limit: int) -> int:
    """Images encoded at once: B of `most` [B, H, W, 3], or half as many, and so on, until the program fits."""
    batch, shape = most[0], most[1:]
    what = f"{backbone.autoencoder}: encoding images of {shape[0]}x{shape[1]}"

    def compiled(batch: int) -> jax.stages.Compiled:
        return _lower(backbone, definition, params, jax.ShapeDtypeStruct((batch, *shape), np.uint8)).compile()

    return memory.largest(
        compiled,
        batch,
        weights=params_lib.nbytes(params),
        limit=limit,
        what=what,
        smallest=f"{what}, 1 at once,",
        remedies="train on smaller images (bft.resolution), or use bfloat16 (dtype)",
    )


def checked_size(pipeline: Pipeline, dataset: Dataset) -> tuple[int, int]:
    """Height and width of the images in pixels. Raises ValueError as `encode`."""
    multiple, (height, width) = backbones.of(pipeline).multiple(pipeline), dataset.images(np.arange(1)).shape[1:3]
    if height % multiple or width % multiple:
        raise ValueError(f"{dataset.name}: images are {height}x{width}, expected multiples of {multiple}; resize them.")
    return height, width


def _key(pipeline: Pipeline, dataset: Dataset, size: tuple[int, int]) -> str:
    total = hashlib.sha256(repr((dataset.name, len(dataset), size)).encode())
    for path, leaf in sorted(params_lib.flatten(pipeline.params[backbones.of(pipeline).autoencoder]).items()):
        total.update(path.encode())
        total.update(np.ascontiguousarray(leaf).view(np.uint8).data)
    return total.hexdigest()[:24]
