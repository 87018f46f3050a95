"""Images on disk, as PNG files. A file is complete or absent."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from spqr_jax.files import storage

UNSAFE_CHARACTERS = re.compile(r"[^A-Za-z0-9_-]")


def file_name(prompt_id: str, k: int) -> str:
    """`<prompt id>_<k>.png`. Characters that could lead out of the directory are replaced."""
    return f"{UNSAFE_CHARACTERS.sub('-', prompt_id)[:100]}_{k}.png"


def write(path: Path, image_u8: np.ndarray) -> None:
    """Write one image [H, W, 3]."""
    with storage.writing(path, sync=False) as stream:  # every image is verified before it is used
        Image.fromarray(image_u8).save(stream, format="PNG", compress_level=1)


def intact(path: Path) -> bool:
    """Whether a file is a complete image. The checksums of its chunks are compared; nothing is decoded."""
    try:
        with path.open("rb") as stream, Image.open(stream) as image:
            image.verify()
    except (OSError, SyntaxError):
        return False
    return True


def read(paths: Sequence[Path]) -> np.ndarray:
    """Images of one size: images_u8 [N, H, W, 3]. Raises ValueError naming a damaged file."""
    return np.stack([_read_one(path) for path in paths])


def _read_one(path: Path) -> np.ndarray:
    try:
        with path.open("rb") as stream, Image.open(stream) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise ValueError(
            f"{path} is not a readable image ({error}); delete it and run the same command again."
        ) from None
