"""Pictures of the emoji world: decode the sprite sheets, composite sprites on backgrounds, render image specs."""

import functools
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from spqr_jax.mini.catalogue import ASSETS, REMEDY, AssetError, catalogue, read_asset
from spqr_jax.mini.world import BACKGROUNDS, IMAGE, MAX_OFFSET, SPRITE, STYLES, Picture

STYLE_INDEX = {style: index for index, style in enumerate(STYLES)}
IS_SCAN = {"plain": False, "scan": True}
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
SCAN_FLOOR = 0.25  # brightness of the lightest tissue on the black plate


@dataclass(frozen=True, eq=False)
class Emoji:
    """Decoded sheets: sprites uint8 [S, E, 28, 28, 4] (style, emoji, RGBA straight alpha) and code -> emoji."""

    sprites: np.ndarray
    index: dict[str, int]


@functools.cache
def load(folder: Path = ASSETS) -> Emoji:
    """Decode and cache the sheets. Raises AssetError naming file and remedy if one is missing, truncated or altered."""
    index = {code: entry.index for code, entry in catalogue(folder).items()}
    sprites = np.stack([_decode_sheet(f"emoji_{style}.webp", len(index), folder) for style in STYLES])
    sprites.flags.writeable = False
    return Emoji(sprites, index)


def compose(sprites_u8: np.ndarray, backgrounds: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Alpha-composite sprites on plain backgrounds.

    sprites_u8 uint8 [N, 28, 28, 4] RGBA straight alpha, backgrounds uint8 [N, 3] RGB, offsets int [N, 2] (dx, dy) in
    0..4, the left and top margins. Returns images_u8 uint8 [N, 32, 32, 3], exactly round(a*s + (1-a)*b).
    Raises ValueError on an offset out of range.
    """
    offsets = np.asarray(offsets)
    if offsets.size and (offsets.min() < 0 or offsets.max() > MAX_OFFSET):
        raise ValueError(f"offsets must be in 0..{MAX_OFFSET}, found {offsets.min()}..{offsets.max()}")
    layer = _place(np.ascontiguousarray(sprites_u8), offsets)
    alpha = layer[..., 3].astype(np.uint16)
    images = np.empty((*layer.shape[:3], 3), np.uint8)
    for channel in range(3):  # by plane: three times as fast as broadcasting alpha over a last axis of 3
        behind = np.asarray(backgrounds)[:, channel].astype(np.uint16)[:, None, None]
        mixed = layer[..., channel].astype(np.uint16)
        mixed -= behind  # wraps modulo 2**16 and comes back: the final sum fits
        mixed *= alpha
        mixed += behind * 255 + 128
        images[..., channel] = (mixed + (mixed >> 8)) >> 8  # exact rounding division by 255
    return images


def scan(images_u8: np.ndarray, coverage_u8: np.ndarray) -> np.ndarray:
    """Turn images into grey, inverted, scan-like ones: black plate, darker objects brighter, as on an X-ray film.

    images_u8 uint8 [N, H, W, 3] on white, coverage_u8 uint8 [N, H, W] the object's alpha. Returns images_u8.
    """
    density = 1 - (images_u8 @ LUMA) / 255
    tissue = coverage_u8 / np.float32(255)
    grey = np.rint(255 * tissue * (SCAN_FLOOR + (1 - SCAN_FLOOR) * density)).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)


def render(pictures: Sequence[Picture]) -> np.ndarray:
    """Draw image specs: images_u8 uint8 [N, 32, 32, 3]. Scans ignore the background. ValueError on unknown names."""
    emoji = load()
    try:
        styles = [STYLE_INDEX[picture.style] for picture in pictures]
        objects = [emoji.index[picture.object] for picture in pictures]
        backgrounds = np.array([BACKGROUNDS[picture.background] for picture in pictures], np.uint8).reshape(-1, 3)
        scans = np.array([IS_SCAN[picture.rendering] for picture in pictures], bool)
    except KeyError as error:
        raise ValueError(f"unknown object, style, background or rendering in a picture: {error}") from None
    offsets = np.array([(picture.dx, picture.dy) for picture in pictures], np.int64).reshape(-1, 2)
    sprites = emoji.sprites[styles, objects]
    backgrounds[scans] = 255
    images = compose(sprites, backgrounds, offsets)
    if scans.any():
        images[scans] = scan(images[scans], _place(sprites[scans], offsets[scans])[..., 3])
    return images


def _place(sprites_u8: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Shift sprites [N, 28, 28, 4] onto a transparent [N, 32, 32, 4]: windows into a padded copy, a uint32 a pixel."""
    count = len(sprites_u8)
    padded = np.zeros((count, IMAGE + MAX_OFFSET, IMAGE + MAX_OFFSET), np.uint32)
    padded[:, MAX_OFFSET:IMAGE, MAX_OFFSET:IMAGE] = sprites_u8.view(np.uint32)[..., 0]
    windows = np.lib.stride_tricks.sliding_window_view(padded, (IMAGE, IMAGE), axis=(1, 2))
    placed = windows[np.arange(count), MAX_OFFSET - offsets[:, 1], MAX_OFFSET - offsets[:, 0]]
    return np.ascontiguousarray(placed).view(np.uint8).reshape(count, IMAGE, IMAGE, 4)


def _decode_sheet(file: str, count: int, folder: Path) -> np.ndarray:
    """Sprites uint8 [count, 28, 28, 4] of one sheet."""
    with Image.open(io.BytesIO(read_asset(file, folder))) as image:
        grid = np.asarray(image.convert("RGBA"))
    rows, columns = grid.shape[0] // SPRITE, grid.shape[1] // SPRITE
    if rows * columns < count:
        raise AssetError(f"{folder / file} holds {rows * columns} sprites, expected {count}; {REMEDY}")
    cells = grid.reshape(rows, SPRITE, columns, SPRITE, 4).swapaxes(1, 2)
    return cells.reshape(-1, SPRITE, SPRITE, 4)[:count]
