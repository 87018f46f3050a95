"""Pictures on disk: PNG, whole or absent."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from spqr_jax.files import storage

UNSAFE_CHARACTERS = re.compile(r"[^A-Za-z0-9_-]")


def file_name(prompt_id: str, k: int) -> str:
    """`<prompt id>_<k>.png`; characters that could leave the directory are replaced."""
    return f"{UNSAFE_CHARACTERS.sub('-', prompt_id)[:100]}_{k}.png"


def write(path: Path, image_u8: np.ndarray) -> None:
    """One picture [H, W, 3]."""
    with storage.writing(path, sync=False) as stream:  # every picture is verified before it is used
        Image.fromarray(image_u8).save(stream, format="PNG", compress_level=1)


def intact(path: Path) -> bool:
    """Whether a file is a whole picture: every chunk's checksum is right, nothing is decoded."""
    try:
        with path.open("rb") as stream, Image.open(stream) as image:
            image.verify()
    except (OSError, SyntaxError):
        return False
    return True


def read(paths: Sequence[Path]) -> np.ndarray:
    """Pictures of one size: images_u8 [N, H, W, 3]. Raises ValueError naming a damaged file."""
    return np.stack([_read_one(path) for path in paths])


def _read_one(path: Path) -> np.ndarray:
    try:
        with path.open("rb") as stream, Image.open(stream) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise ValueError(
            f"{path} is not a readable picture ({error}); delete it and run the same command again."
        ) from None
