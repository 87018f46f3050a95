"""The files that a bundle may hold, how large they may be, and reading them from a directory that nobody vouches for.

Nothing is followed, and nothing is read before its kind and size are known. Every file is read once, into memory, so
that what is checked is what is used.
"""

import hashlib
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

INDEX = "submission.json"
MANIFEST = "manifest.json"
PROMPTS = "prompts.json"
LEADERBOARD = "leaderboard.json"
REFERENCE = "reference_features.npz"
REQUIRED = (INDEX, MANIFEST, PROMPTS, LEADERBOARD)
IN_CELL = ("cell.json", "records.parquet", "features.npz", "drift.parquet")
CELL_REQUIRED = IN_CELL[:3]
CELL = re.compile(r"cells/([\w-]{1,150})/([a-z]+\.[a-z]+)")

LARGEST_FILES = {".json": 32 << 20, ".parquet": 256 << 20, ".npz": 1 << 30}  # bytes, by the end of a name
LARGEST_BUNDLE = 4 << 30  # bytes
MOST_FILES = 10_000


class Refused(ValueError):
    """A bundle that is not accepted. `faults`: every reason that was found, each a line that names its file."""

    def __init__(self, faults: list[str]):
        super().__init__("\n".join(faults))
        self.faults = faults


class Entry(NamedTuple):
    """What the index says about a file."""

    bytes: int
    sha256: str


def cell_of(name: str) -> tuple[str, str] | None:
    """The id of the cell and the file in it that a path in a bundle names, None for other paths."""
    found = CELL.fullmatch(name)
    return (found[1], found[2]) if found and found[2] in IN_CELL else None


def is_known(name: str) -> bool:
    """Whether a bundle may hold a file of this name: a path relative to it, with forward slashes."""
    return name in REQUIRED or name == REFERENCE or cell_of(name) is not None


def largest(name: str) -> int:
    """The bytes that a file of this name may have."""
    return LARGEST_FILES[Path(name).suffix]


def listed(directory: Path) -> dict[str, int]:
    """name -> bytes of every file of a bundle. Raises Refused for anything that a bundle may not hold."""
    if directory.is_symlink() or not directory.is_dir():
        raise Refused([f"{directory}: expected a directory, the bundle that `submit` wrote"])
    found: dict[str, int] = {}
    faults: list[str] = []
    for name, status in _walk(directory, ""):
        if len(found) + len(faults) >= MOST_FILES:
            raise Refused([f"{shown(directory.name)}: more than {MOST_FILES:,} files"])
        if not stat.S_ISREG(status.st_mode):
            faults.append(f"{shown(name)}: a link or a special file; a bundle holds plain files alone")
        elif not is_known(name):
            faults.append(f"{shown(name)}: no file of a bundle has this name")
        elif status.st_size > largest(name):
            faults.append(f"{name}: {status.st_size:,} bytes, more than the {largest(name):,} that are read")
        else:
            found[name] = status.st_size
    faults += [f"{name}: is missing" for name in _required(found) if name not in found]
    if (total := sum(found.values())) > LARGEST_BUNDLE:
        faults.append(f"the files have {total:,} bytes together, more than the {LARGEST_BUNDLE:,} that are read")
    if faults:
        raise Refused(faults)
    return found


def _walk(directory: Path, below: str) -> Iterator[tuple[str, os.stat_result]]:
    """Every name below a directory that is no directory itself, and every directory where a bundle has none."""
    with os.scandir(directory) as entries:
        for entry in sorted(entries, key=lambda e: e.name):
            name = below + entry.name
            if entry.is_dir(follow_symlinks=False) and re.fullmatch(r"cells(/[\w-]{1,150})?", name):
                yield from _walk(directory / entry.name, f"{name}/")
            else:
                yield name, entry.stat(follow_symlinks=False)


def _required(found: Mapping[str, int]) -> list[str]:
    """The files that a bundle with these files must hold."""
    cells = sorted({cell[0] for name in found if (cell := cell_of(name))})
    return [*REQUIRED, *(f"cells/{cell}/{name}" for cell in cells for name in CELL_REQUIRED)]


def content(directory: Path, name: str, expected: Entry | None = None) -> bytes:
    """The bytes of one file. Raises Refused for one that is not what the index says about it."""
    limit = largest(name) if expected is None else expected.bytes
    try:
        handle = os.open(directory / name, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    except OSError as error:
        raise Refused([f"{name}: cannot be opened ({error.strerror})"]) from None
    with os.fdopen(handle, "rb") as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise Refused([f"{name}: no plain file"])
        data = stream.read(limit + 1)
    if expected is not None and len(data) != expected.bytes:
        raise Refused([f"{name}: another number of bytes than the {expected.bytes:,} of the index"])
    if len(data) > limit:
        raise Refused([f"{name}: more than the {limit:,} bytes that are read"])
    if expected is not None and (found := hashlib.sha256(data).hexdigest()) != expected.sha256:
        raise Refused([f"{name}: sha256 {found[:12]}, the index has {expected.sha256[:12]}; the file was changed"])
    return data


def shown(text: str) -> str:
    """A text of a bundle as messages show it: on one line, without characters that a terminal obeys, and cut."""
    plain = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return plain if len(plain) <= 100 else plain[:97] + "..."
