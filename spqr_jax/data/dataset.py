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
        geometry: rows -> int32 [len(rows), 4], pixels: height and width of the original image before resizing, and top
            and left of the crop in the resized one. None: images are whole, and have the size in which they come.
        at_pass: number of a pass over the data -> the data set of this pass, with other crops and flips and another
            name. The data set itself is that of pass 0. None: every pass is the same.
    """

    captions: tuple[str, ...]
    images: Callable[[np.ndarray], np.ndarray]
    name: str = "dataset"
    geometry: Callable[[np.ndarray], np.ndarray] | None = None
    at_pass: Callable[[int], "Dataset"] | None = None

    def __len__(self) -> int:
        return len(self.captions)

    def of_pass(self, number: int) -> "Dataset":
        """The data set of a pass over the data, from 0: itself where every pass is the same."""
        return self if self.at_pass is None else self.at_pass(number)

    def geometries(self, rows: np.ndarray, passes: np.ndarray) -> np.ndarray | None:
        """The geometry of rows int [B] in passes int [B]: int32 [B, 4], or None if the images are whole."""
        if self.geometry is None:
            return None
        found = np.zeros((len(rows), 4), np.int32)
        for number in np.unique(passes):
            seen, where = self.of_pass(int(number)), passes == number
            assert seen.geometry is not None  # a data set has a geometry in every pass or in none
            found[where] = seen.geometry(rows[where])
        return found


def from_arrays(images_u8: np.ndarray, captions: Sequence[str], name: str = "dataset") -> Dataset:
    """A data set in memory. Raises ValueError unless images are uint8 RGB and as many as captions."""
    if images_u8.ndim != 4 or images_u8.shape[-1] != 3 or images_u8.dtype != np.uint8:
        raise ValueError(f"{name}: images must be uint8 [N, H, W, 3], found {images_u8.dtype} {images_u8.shape}.")
    if len(images_u8) != len(captions):
        raise ValueError(f"{name}: {len(images_u8)} images but {len(captions)} captions.")
    whole = np.array([*images_u8.shape[1:3], 0, 0], np.int32)
    return Dataset(tuple(captions), lambda rows: images_u8[rows], name, lambda rows: np.tile(whole, (len(rows), 1)))
