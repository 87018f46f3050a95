"""LLaVA-OneVision's views of an image, and how their features are packed into one row of image tokens.

- base    the whole image squeezed to S x S
- anyres  the base view, and the image fitted into the best of many grids of S x S tiles, with black padding

Letters: H x W the image, S side of a view, V views, g side of a view's grid of tokens (L = g * g), D width, K tokens.
"""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from judges.preprocess import interpolation_matrix

VIEWS = ("base", "anyres")


class Geometry(NamedTuple):
    """Sizes that the model fixes.

    Attributes:
        side: pixels along a view.
        tokens: tokens along a view.
        grids: (height, width) in pixels of every grid of tiles.
        max_patches: number of tiles above which features are shrunk.
    """

    side: int
    tokens: int
    grids: tuple[tuple[int, int], ...]
    max_patches: int = 9


def best_grid(height: int, width: int, grids: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The grid (height, width) that keeps most pixels of the image.

    Of several such grids the smallest, then the first.
    """

    def fit(grid: tuple[int, int]) -> tuple[int, int]:
        scale = min(grid[1] / width, grid[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, -(grid[0] * grid[1] - kept)

    return max(grids, key=fit)


def views(image: np.ndarray, geometry: Geometry, view: str) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [V, S, S, 3]: the base view, and if `view` is anyres the tiles row by row."""
    side = geometry.side
    base = bicubic(image, side, side)
    if view == "base":
        return base[None]
    height, width = best_grid(image.shape[0], image.shape[1], geometry.grids)
    fitted = fit_inside(image, height, width)
    tiles = fitted.reshape(height // side, side, width // side, side, 3).transpose(0, 2, 1, 3, 4)
    return np.concatenate([base[None], tiles.reshape(-1, side, side, 3)])


def fit_inside(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [height, width, 3]: the image in the centre, its aspect kept, black around it."""
    scale_w, scale_h = width / image.shape[1], height / image.shape[0]
    if scale_w < scale_h:
        inner = min(math.ceil(image.shape[0] * scale_w), height), width
    else:
        inner = height, min(math.ceil(image.shape[1] * scale_h), width)
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    canvas = np.zeros((height, width, 3), np.uint8)
    canvas[top : top + inner[0], left : left + inner[1]] = bicubic(image, *inner)
    return canvas


def bicubic(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [height, width, 3] by Pillow's bicubic with antialiasing."""
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def pack(features: np.ndarray, newline: np.ndarray | None, size: tuple[int, int], geometry: Geometry) -> np.ndarray:
    """Features [V, L, D] of one image of `size` (H, W) -> image tokens [K, D].

    Of one view these are its tokens, and `newline` [D] at the end (nothing if it is None, as in transformers.js). Of
    several views these are the tokens of the base view, and those of the tiles as one map: without padding, shrunk if
    it is large, `newline` at the end of each row. Raises ValueError for several views without `newline`.
    """
    if len(features) == 1:
        return features[0] if newline is None else np.concatenate([features[0], newline[None]])
    if newline is None:
        raise ValueError("view anyres needs the learned image_newline")
    grid = best_grid(size[0], size[1], geometry.grids)
    rows, columns, g = grid[0] // geometry.side, grid[1] // geometry.side, geometry.tokens
    tiles = features[1:].reshape(rows, columns, g, g, -1).transpose(4, 0, 2, 1, 3)
    tiles = shrink(unpad(tiles.reshape(-1, rows * g, columns * g), size), geometry)
    ends = np.broadcast_to(newline[:, None, None], (*tiles.shape[:2], 1)).astype(tiles.dtype)
    packed = np.concatenate([tiles, ends], axis=2).reshape(len(newline), -1).T
    return np.concatenate([features[0], packed])


def unpad(tiles: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[D, h, w] without the rows or columns that show only the padding around an image of `size` (H, W)."""
    height, width = tiles.shape[1:]
    if size[1] / size[0] > width / height:
        cut = (height - int(round(size[0] * (width / size[1]), 7))) // 2
        return tiles[:, cut : height - cut]
    cut = (width - int(round(size[1] * (height / size[0]), 7))) // 2
    return tiles[:, :, cut : width - cut]


def shrink(tiles: np.ndarray, geometry: Geometry) -> np.ndarray:
    """[D, h, w], bilinearly shrunk to the tokens of about `max_patches` views if it is more than 1.1 times as wide."""
    height, width = tiles.shape[1:]
    ratio = math.sqrt(height * width / (geometry.max_patches * geometry.tokens**2))
    if ratio <= 1.1:
        return tiles
    rows = interpolation_matrix(height, int(height // ratio), "bilinear")
    columns = interpolation_matrix(width, int(width // ratio), "bilinear")
    return (rows @ tiles.astype(np.float32) @ columns.T).astype(tiles.dtype)
