"""Pictures on disk: PNG, written under a temporary name and renamed."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

UNSAFE_CHARACTERS = re.compile(r"[^A-Za-z0-9_-]")


def file_name(prompt_id: str, k: int) -> str:
    """`<prompt id>_<k>.png`; characters that could leave the directory are replaced."""
    return f"{UNSAFE_CHARACTERS.sub('-', prompt_id)[:100]}_{k}.png"


def write(path: Path, image_u8: np.ndarray) -> None:
    """One picture [H, W, 3]."""
    partial = path.with_suffix(".png.partial")
    Image.fromarray(image_u8).save(partial, format="PNG", compress_level=1)
    os.replace(partial, path)


def intact(path: Path) -> bool:
    """Whether a file is a whole picture: every chunk's checksum is right, nothing is decoded."""
    try:
        with Image.open(path) as image:
            image.verify()
    except (OSError, SyntaxError):
        return False
    return True


def read(paths: Sequence[Path]) -> np.ndarray:
    """Pictures of one size: images_u8 [N, H, W, 3]. Raises ValueError naming a damaged file."""
    return np.stack([_read_one(path) for path in paths])


def _read_one(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise ValueError(
            f"{path} is not a readable picture ({error}); delete it and run the same command again."
        ) from None
