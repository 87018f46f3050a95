"""The latents of a data set: the VAE runs once over the images, and training draws from the stored distributions."""

import functools
import hashlib
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from spqr_jax import backbones
from spqr_jax import params as params_lib
from spqr_jax.backbones import Backbone
from spqr_jax.data import Dataset
from spqr_jax.devices import mesh as mesh_lib
from spqr_jax.devices import processes
from spqr_jax.files import storage
from spqr_jax.params import Definition, Params
from spqr_jax.pipeline import Pipeline

# Images encoded at once: at most 64, and with at most the pixels of 4 images of 512x512 (about 2 KiB a pixel).
ENCODE_PIXELS, ENCODE_BATCH = 4 * 512 * 512, 64


class Latents(NamedTuple):
    """Mean and log-variance of the latents of N images, float32 [N, h, w, C] each, before scaling."""

    mean: np.ndarray
    logvar: np.ndarray

    def scaled(self, pipeline: Pipeline) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the scaled latents, which the denoiser sees: float32 [N, h, w, C] each."""
        backbone = backbones.of(pipeline)
        return backbone.scaled(self.mean, self.logvar, backbone.scaling(pipeline))

    def rows(self, index: np.ndarray) -> "Latents":
        """The rows that a NumPy index chooses."""
        return Latents(self.mean[index], self.logvar[index])


def encode(pipeline: Pipeline, dataset: Dataset, *, cache: Path | None = None) -> Latents:
    """The latents of every image.

    cache: a directory in which they are kept under a hash of data set, VAE and size, so that a sweep encodes each data
    set once. Raises ValueError if a side of the images is no multiple of the VAE's factor.
    """
    size = _checked_size(pipeline, dataset)
    file = None if cache is None else cache / f"{_key(pipeline, dataset, size)}.npz"
    if file is not None and file.exists():
        stored = storage.read_npz(file)
        return Latents(stored["mean"], stored["logvar"])
    backbone, means, logvars = backbones.of(pipeline), [], []
    autoencoder = pipeline.definitions[backbone.autoencoder], pipeline.params[backbone.autoencoder]
    batch = max(1, min(ENCODE_BATCH, ENCODE_PIXELS // (size[0] * size[1]), len(dataset)))
    for start in range(0, len(dataset), batch):
        rows = np.arange(start, min(start + batch, len(dataset)))
        images = mesh_lib.pad_batch(dataset.images(rows), batch)
        mean, logvar = encode_batch(backbone, *autoencoder, images)
        means.append(np.asarray(mean, np.float32)[: len(rows)])
        logvars.append(np.asarray(logvar, np.float32)[: len(rows)])
    made = Latents(np.concatenate(means), np.concatenate(logvars))
    if file is not None and processes.first():
        storage.write_npz(file, **made._asdict())
    return made


@functools.partial(jax.jit, static_argnums=(0, 1))
def encode_batch(backbone: Backbone, definition: Definition, params: Params, images_u8: jax.Array):
    """images_u8 [B, H, W, 3] -> mean and log-variance [B, h, w, C]."""
    return backbone.encode(definition.bind(params), images_u8)


def _checked_size(pipeline: Pipeline, dataset: Dataset) -> tuple[int, int]:
    multiple, (height, width) = backbones.of(pipeline).factor(pipeline), dataset.images(np.arange(1)).shape[1:3]
    if height % multiple or width % multiple:
        raise ValueError(f"{dataset.name}: images are {height}x{width}, expected multiples of {multiple}; resize them.")
    return height, width


def _key(pipeline: Pipeline, dataset: Dataset, size: tuple[int, int]) -> str:
    total = hashlib.sha256(repr((dataset.name, len(dataset), size)).encode())
    for path, leaf in sorted(params_lib.flatten(pipeline.params[backbones.of(pipeline).autoencoder]).items()):
        total.update(path.encode())
        total.update(np.ascontiguousarray(leaf).view(np.uint8).data)
    return total.hexdigest()[:24]
