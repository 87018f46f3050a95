"""WebDataset tar files. Members of one name make a sample; they are read inside the tar, and nothing is unpacked."""

import tarfile
from glob import glob
from pathlib import Path
from typing import NamedTuple

from spqr_jax.data import tables
from spqr_jax.data.source import PICTURE_SUFFIXES, Source

CAPTION_SUFFIXES = (".txt", ".caption", ".json")
JSON_FIELDS = ("caption", "text", "prompt")


class Member(NamedTuple):
    """A file inside a tar: the tar, its name, offset and size of its bytes."""

    file: Path
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        """Its bytes. Raises OSError if the tar ends before them."""
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            content = stream.read(self.size)
        if len(content) < self.size:
            raise OSError(f"{self.file} ends inside {self.name}")
        return content


def files(path: Path) -> list[Path]:
    """The tar files of a path: the file itself, those in a folder, or the matches of a pattern (`train-*.tar`)."""
    if path.is_dir():
        return sorted(path.glob("*.tar"))
    return [path] if path.is_file() else [Path(name) for name in sorted(glob(str(path)))]


def open_webdataset(path: Path) -> Source:
    """Images with a caption, a member of the same name: .txt, .caption, or .json with a caption field. In file order.

    Raises ValueError with a file that is no plain tar (a compressed one must be decompressed first), or with a damaged
    member.
    """
    found = files(path)
    if not found:
        raise FileNotFoundError(f"{path} names no tar file.")
    pictures: list[Member] = []
    captions: list[str] = []
    for file in found:
        for sample in _samples(file).values():
            picture = next((member for suffix, member in sample.items() if suffix in PICTURE_SUFFIXES), None)
            text = next((sample[suffix] for suffix in CAPTION_SUFFIXES if suffix in sample), None)
            if picture and text:
                pictures.append(picture)
                captions.append(_caption(text))
    if not pictures:
        raise ValueError(f"{path} holds no image with a .txt, .caption or .json member of the same name.")
    where = tuple(f"{member.file}:{member.name}" for member in pictures)
    return Source(f"webdataset:{path}", tuple(captions), where, lambda i: pictures[i].read(), "caption member")


def _samples(file: Path) -> dict[str, dict[str, Member]]:
    """Sample -> suffix -> member. The suffix starts at the first dot: a/b.seg.png is .seg.png of the sample a/b."""
    samples: dict[str, dict[str, Member]] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                if not member.isreg() or member.sparse is not None:
                    continue
                folder, _, base = member.name.rpartition("/")
                key, _, suffix = base.partition(".")
                found = Member(file, member.name, member.offset_data, member.size)
                samples.setdefault(f"{folder}/{key}", {}).setdefault(f".{suffix.lower()}", found)
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"{file} is not a readable tar file ({error}); decompress it, or fetch it again.") from None
    return samples


def _caption(member: Member) -> str:
    try:
        text = member.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{member.file}:{member.name} is not UTF-8 ({error.reason} at byte {error.start}).") from None
    if not member.name.lower().endswith(".json"):
        return text.strip()
    row = tables.parse_json(text, f"{member.file}:{member.name}")
    return next((tables.text_of(row[field]) for field in JSON_FIELDS if row.get(field)), "")
