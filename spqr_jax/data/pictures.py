"""One picture: decoded, resized and cropped as the reference training script does."""

import io
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

CROPS = ("center", "random")


class Preprocess(NamedTuple):
    """How a picture becomes a training sample.

    side: pixels of the square. crop: "center" or "random" place of the crop. flip: mirror half of the pictures. seed
    and epoch: of crops and flips, together with a picture's number. Latents are encoded once, so a run uses epoch 0.
    """

    side: int
    crop: str = "center"
    flip: bool = False
    seed: int = 0
    epoch: int = 0


def decode(content: bytes) -> Image.Image:
    """Encoded bytes -> RGB picture, turned as its EXIF says. Raises ValueError with the reason."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = (
            "empty" if not content else str(error).replace("<_io.BytesIO object", "<the picture").split(" at 0x")[0]
        )
        raise ValueError(f"not a readable picture ({reason})") from None


def measure(content: bytes) -> tuple[int, int]:
    """(width, height) of a picture whose whole data decode. JPEGs are decoded at an eighth of the size, which reads
    every byte too and takes a fraction of the time. Raises ValueError with the reason."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            size = image.size
            image.draft("RGB", (1, 1))
            image.load()
            return size
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return decode(content).size  # or says what is wrong


def prepare(image: Image.Image, how: Preprocess, index: int) -> np.ndarray:
    """Picture -> uint8 [side, side, 3].

    As diffusers' train_text_to_image.py with torchvision: the shorter side resized to `side` (bilinear, antialiased), a
    square crop, a flip. The crop and the flip are a function of (seed, epoch, index) alone. Where that script crops at
    random unless told --center_crop, the centre is the default here.
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
