"""One image: decoding, and resizing and cropping as the reference training script does."""

import io
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

CROPS = ("center", "random")


class Preprocess(NamedTuple):
    """How an image becomes a training sample.

    Attributes:
        side: pixels along the square.
        crop: place of the crop, "center" or "random".
        flip: mirror half of the images.
        seed, epoch: determine crops and flips, together with an image's number. Latents are encoded once, so a run uses
            epoch 0.
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
    """(width, height) in pixels of an image, after decoding all of its data. Raises ValueError with the reason.

    A JPEG is decoded at an eighth of its size. That reads every byte too, and takes a fraction of the time.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            size = image.size
            image.draft("RGB", (1, 1))
            image.load()
            return size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return decode(content).size  # or raises with the reason


def prepare(image: Image.Image, how: Preprocess, index: int) -> np.ndarray:
    """An image -> uint8 [side, side, 3], as diffusers' train_text_to_image.py makes it with torchvision.

    The shorter side is resized to `side` (bilinear, antialiased); then follow a square crop and a flip. Crop and flip
    are a function of (seed, epoch, index) alone. The centre is the default here; that script crops at random without
    its option --center_crop.
    """
    width, height = image.size
    short = min(width, height)
    size = (int(how.side * width / short), int(how.side * height / short))
    if size != image.size:
        image = image.resize(size, Image.Resampling.BILINEAR)
    rng = np.random.default_rng((how.seed, how.epoch, index))
    spare = np.array([size[0] - how.side, size[1] - how.side])
    left, top = rng.integers(0, spare + 1) if how.crop == "random" else np.round(spare / 2).astype(int)
    pixels = np.asarray(image)[top : top + how.side, left : left + how.side]
    return np.ascontiguousarray(pixels[:, ::-1] if how.flip and rng.random() < 0.5 else pixels)
