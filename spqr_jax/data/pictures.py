"""One image: decoding, and resizing and cropping as the reference training script does."""

import io
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps

CROPS = ("center", "random")
QUARTER_TURNS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


class Preprocess(NamedTuple):
    """How an image becomes a training sample.

    Attributes:
        side: pixels along the square.
        crop: place of the crop, "center" or "random".
        flip: mirror half of the images.
        seed, epoch: determine crops and flips, together with an image's number. epoch is the number of the pass over
            the data.
    """

    side: int
    crop: str = "center"
    flip: bool = False
    seed: int = 0
    epoch: int = 0


def decode(content: bytes) -> Image.Image:
    """Encoded bytes -> RGB image, turned as its EXIF data say. Raises ValueError with the reason."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "empty" if not content else str(error).replace("<_io.BytesIO object", "<the image").split(" at 0x")[0]
        raise ValueError(f"not a readable image ({reason})") from None


def measure(content: bytes) -> tuple[int, int]:
    """(width, height) in pixels of an image, turned as its EXIF data say, after decoding all of its data.

    A JPEG is decoded at an eighth of its size. That reads every byte too, and takes a fraction of the time. Raises
    ValueError with the reason.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
            image.draft("RGB", (1, 1))
            image.load()
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in QUARTER_TURNS
            return (height, width) if turned else (width, height)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return decode(content).size  # or raises with the reason


class Frame(NamedTuple):
    """The part of an image that training sees.

    Attributes:
        width, height: pixels of the whole image after resizing.
        left, top: pixels before the crop.
        flipped: whether the crop is mirrored.
    """

    width: int
    height: int
    left: int
    top: int
    flipped: bool


def frame(width: int, height: int, how: Preprocess, index: int) -> Frame:
    """The frame of an image of `width` x `height` pixels: a function of (seed, epoch, index) and its size alone."""
    size = resized(width, height, how.side)
    rng = np.random.default_rng((how.seed, how.epoch, index))
    spare = np.array(size) - how.side
    left, top = rng.integers(0, spare + 1) if how.crop == "random" else np.round(spare / 2).astype(int)
    return Frame(*size, int(left), int(top), how.flip and rng.random() < 0.5)


def resized(width: int, height: int, side: int) -> tuple[int, int]:
    """(width, height) after resizing: `side` and, for the longer side, its multiple rounded down, as in torchvision."""
    short = min(width, height)
    return int(side * width / short), int(side * height / short)


def varies(width: int, height: int, how: Preprocess) -> bool:
    """Whether the frame of an image of `width` x `height` pixels may differ from pass to pass."""
    size = resized(width, height, how.side)
    return how.flip or (how.crop == "random" and size[0] != size[1])


def geometry(width: int, height: int, how: Preprocess, index: int) -> tuple[int, int, int, int]:
    """The original height and width of an image, and the top and left of its crop in the resized image.

    A flip counts as made before the crop, as in diffusers' train_text_to_image_sdxl.py (since January 2024).
    """
    seen = frame(width, height, how, index)
    return height, width, seen.top, seen.width - how.side - seen.left if seen.flipped else seen.left


def prepare(image: Image.Image, how: Preprocess, index: int) -> np.ndarray:
    """An image -> uint8 [side, side, 3], as diffusers' train_text_to_image.py makes it with torchvision.

    The shorter side is resized to `side` (bilinear, antialiased); then follow a square crop and a flip (see `frame`).
    The centre is the default here; that script crops at random without its option --center_crop.
    """
    seen = frame(*image.size, how, index)
    if (seen.width, seen.height) != image.size:
        image = image.resize((seen.width, seen.height), Image.Resampling.BILINEAR)
    pixels = np.asarray(image)[seen.top : seen.top + how.side, seen.left : seen.left + how.side]
    return np.ascontiguousarray(pixels[:, ::-1] if seen.flipped else pixels)
