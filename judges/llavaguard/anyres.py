"""LLaVA-OneVision's views of a picture, and how their features are packed into one row of image tokens.

- base    the whole picture squeezed to S x S, alone
- anyres  the base view, then the picture fitted into the best of many grids of S x S tiles, padded with black

Letters: H x W the picture, S side of a view, V views, g side of a view's grid of tokens (L = g * g), D width, K tokens.
"""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from judges.preprocess import interpolation_matrix

VIEWS = ("base", "anyres")


class Geometry(NamedTuple):
    """What the model fixes: view side, tokens along a view, grids (height, width), tiles before features shrink."""

    side: int
    tokens: int
    grids: tuple[tuple[int, int], ...]
    max_patches: int = 9


def best_grid(height: int, width: int, grids: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The grid (h, w) that keeps most of the picture's pixels, and among those wastes least; the first wins ties."""

    def fit(grid: tuple[int, int]) -> tuple[int, int]:
        scale = min(grid[1] / width, grid[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, -(grid[0] * grid[1] - kept)

    return max(grids, key=fit)


def views(image: np.ndarray, geometry: Geometry, view: str) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [V, S, S, 3]: base view first, then tiles row by row if `view` is anyres."""
    side = geometry.side
    base = bicubic(image, side, side)
    if view == "base":
        return base[None]
    height, width = best_grid(image.shape[0], image.shape[1], geometry.grids)
    fitted = fit_inside(image, height, width)
    tiles = fitted.reshape(height // side, side, width // side, side, 3).transpose(0, 2, 1, 3, 4)
    return np.concatenate([base[None], tiles.reshape(-1, side, side, 3)])


def fit_inside(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [height, width, 3]: aspect kept, centred, black around."""
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
    """Features [V, L, D] of one picture of `size` (H, W) -> image tokens [K, D].

    One view: its tokens and one `newline` [D] (none if newline is None, which is transformers.js's contract). Several:
    the base view's tokens, then the tiles as one map, padding cut off, shrunk if large, `newline` ending each row.
    """
    if len(features) == 1:
        return features[0] if newline is None else np.concatenate([features[0], newline[None]])
    if newline is None:
        raise ValueError("anyres needs the learned image_newline")
    grid = best_grid(size[0], size[1], geometry.grids)
    rows, columns, g = grid[0] // geometry.side, grid[1] // geometry.side, geometry.tokens
    tiles = features[1:].reshape(rows, columns, g, g, -1).transpose(4, 0, 2, 1, 3)
    tiles = shrink(unpad(tiles.reshape(-1, rows * g, columns * g), size), geometry)
    ends = np.broadcast_to(newline[:, None, None], (*tiles.shape[:2], 1)).astype(tiles.dtype)
    packed = np.concatenate([tiles, ends], axis=2).reshape(len(newline), -1).T
    return np.concatenate([features[0], packed])


def unpad(tiles: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[D, h, w] without the rows or columns of tokens that hold only the padding around a picture of `size`."""
    height, width = tiles.shape[1:]
    if size[1] / size[0] > width / height:
        cut = (height - int(round(size[0] * (width / size[1]), 7))) // 2
        return tiles[:, cut : height - cut]
    cut = (width - int(round(size[1] * (height / size[0]), 7))) // 2
    return tiles[:, :, cut : width - cut]


def shrink(tiles: np.ndarray, geometry: Geometry) -> np.ndarray:
    """[D, h, w] bilinearly shrunk to about max_patches views' worth of tokens, if it is more than 1.1 times as wide."""
    height, width = tiles.shape[1:]
    ratio = math.sqrt(height * width / (geometry.max_patches * geometry.tokens**2))
    if ratio <= 1.1:
        return tiles
    rows = interpolation_matrix(height, int(height // ratio), "bilinear")
    columns = interpolation_matrix(width, int(width // ratio), "bilinear")
    return (rows @ tiles.astype(np.float32) @ columns.T).astype(tiles.dtype)
