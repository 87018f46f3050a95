"""Captioned images ready for training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Dataset:
    """N captioned images.

    Attributes:
        captions: N texts.
        images: rows (int array) -> images_u8 [len(rows), H, W, 3]. It is called for parts of the data, so that not all
            images need to fit in memory.
        name: names the data in messages and in keys of caches.
    """

    captions: tuple[str, ...]
    images: Callable[[np.ndarray], np.ndarray]
    name: str = "dataset"

    def __len__(self) -> int:
        return len(self.captions)


def from_arrays(images_u8: np.ndarray, captions: Sequence[str], name: str = "dataset") -> Dataset:
    """A data set in memory. Raises ValueError unless images are uint8 RGB and as many as captions."""
    if images_u8.ndim != 4 or images_u8.shape[-1] != 3 or images_u8.dtype != np.uint8:
        raise ValueError(f"{name}: images must be uint8 [N, H, W, 3], found {images_u8.dtype} {images_u8.shape}.")
    if len(images_u8) != len(captions):
        raise ValueError(f"{name}: {len(images_u8)} images but {len(captions)} captions.")
    return Dataset(tuple(captions), lambda rows: images_u8[rows], name)
