"""DreamBooth's prior preservation: every step sees as many class pictures as pictures of the one thing.

The class pictures are drawn by the model itself before it is trained, so that it keeps what it knew of the class. The
loss is that of diffusers' examples/dreambooth: mean error of the pictures + weight * mean error of the class pictures.
"""

import hashlib
from typing import NamedTuple

import numpy as np

from spqr_jax import data
from spqr_jax.data import Batch, Dataset


class Prior(NamedTuple):
    """What a data set of `joined` holds: its first `pictures` rows, then `class_pictures` rows.

    weight: of the class pictures' mean error in the loss.
    """

    pictures: int
    class_pictures: int
    weight: float = 1.0


def joined(pictures: Dataset, caption: str, class_images: np.ndarray, kind: str) -> Dataset:
    """The pictures, all with one caption, and after them the class pictures uint8 [N, H, W, 3], captioned `kind`.

    Raises ValueError if the two are of different sizes, or if there are none of one.
    """
    count, classes = len(pictures), len(class_images)
    if not count or not classes:
        raise ValueError(f"dreambooth has {count} pictures and {classes} class pictures; it needs some of both.")
    size = pictures.images(np.arange(1)).shape[1:3]
    if size != class_images.shape[1:3]:
        raise ValueError(f"dreambooth: pictures are {size} pixels, class pictures {class_images.shape[1:3]}.")

    def images(rows: np.ndarray) -> np.ndarray:
        found, of_class = np.empty((len(rows), *size, 3), np.uint8), rows >= count
        found[of_class] = class_images[rows[of_class] - count]
        if not of_class.all():
            found[~of_class] = pictures.images(rows[~of_class])
        return found

    content = hashlib.sha256(np.ascontiguousarray(class_images).tobytes()).hexdigest()[:16]
    name = f"{pictures.name} as {caption!r} and {classes} of {kind!r} {content}"
    return Dataset((*[caption] * count, *[kind] * classes), images, name)


def batches(prior: Prior, batch_size: int, steps: int, seed: int) -> list[Batch]:
    """The rows of every step: half of a batch pictures, the other half class pictures.

    As in diffusers' script both are numbered around: place i of a pass over the longer of the two shows picture i and
    class picture i, each modulo its number. Raises ValueError for a batch that has no halves.
    """
    if batch_size % 2:
        raise ValueError(f"dreambooth: batch_size {batch_size} must be even, half pictures and half class pictures.")
    longer = max(prior.pictures, prior.class_pictures)
    return [
        Batch(
            np.concatenate([one.rows % prior.pictures, prior.pictures + one.rows % prior.class_pictures]),
            np.zeros(batch_size, int),
        )
        for one in data.curriculum_batches([longer], batch_size // 2, steps, seed)
    ]


def weights(prior: Prior, rows: np.ndarray) -> np.ndarray:
    """The weights of a batch's samples in the loss, float32 [B]."""
    half = len(rows) // 2
    return (np.where(rows < prior.pictures, 1, prior.weight) / half).astype(np.float32)
