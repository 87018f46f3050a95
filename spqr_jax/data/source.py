"""Captioned images on disk, before any is decoded. Every layout is read into a `Source`."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class Source(NamedTuple):
    """N captioned images on disk.

    Attributes:
        name: kind and place, for messages.
        captions: N texts. An empty one is reported when its row is looked at.
        where: N places, for messages: a path, or a file and the row or member in it.
        read: row -> bytes of the encoded image. Raises OSError if it is missing.
        rule: how captions were chosen or made, in words.
        prefetch: is called with rows before they are read, for layouts in which reading single rows is slow.
        parts: numbers of rows of the data sets in a mixture, which lie one after another; () for a single data set.
        plugin: of a reader that is not of this package, its distribution and version, its place and the sha256 of its
            files (`judges.plugins`); else "".
    """

    name: str
    captions: tuple[str, ...]
    where: tuple[str, ...]
    read: Callable[[int], bytes]
    rule: str
    prefetch: Callable[[Sequence[int]], None] = lambda rows: None
    parts: tuple[int, ...] = ()
    plugin: str = ""

    def __len__(self) -> int:
        return len(self.captions)


def of_files(name: str, pairs: Iterable[tuple[Path, str]], rule: str) -> Source:
    """A source of pairs (image file, caption). Raises ValueError if there is none."""
    listed = list(pairs)
    if not listed:
        raise ValueError(f"{name} holds no captioned image.")
    paths = [path for path, _ in listed]
    return Source(
        name, tuple(caption for _, caption in listed), tuple(map(str, paths)), lambda i: paths[i].read_bytes(), rule
    )


def read_by(plugin: str, source: Source) -> Source:
    """The source with its field `plugin`. (A Source counts its images as its length, so `_replace` does not work.)"""
    s = source
    return Source(s.name, s.captions, s.where, s.read, s.rule, s.prefetch, s.parts, plugin)


def mix(sources: Sequence[Source]) -> Source:
    """Several sources as one, one after another; `parts` holds their lengths."""
    if len(sources) == 1:
        return sources[0]
    rows = [(source, row) for source in sources for row in range(len(source))]
    starts = [sum(len(s) for s in sources[:i]) for i in range(len(sources))]

    def prefetch(wanted: Sequence[int]) -> None:
        for source, start in zip(sources, starts, strict=True):
            source.prefetch([row - start for row in wanted if start <= row < start + len(source)])

    return Source(
        " + ".join(source.name for source in sources),
        tuple(caption for source in sources for caption in source.captions),
        tuple(where for source in sources for where in source.where),
        lambda i: rows[i][0].read(rows[i][1]),
        "; ".join(dict.fromkeys(source.rule for source in sources)),
        prefetch,
        tuple(len(source) for source in sources),
        "; ".join(dict.fromkeys(source.plugin for source in sources if source.plugin)),
    )


def pictures_under(folder: Path) -> list[Path]:
    """The paths of all images under a folder, sorted, also in linked subfolders. Hidden files are left out."""
    return sorted(
        Path(root, name)
        for root, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.lower().endswith(PICTURE_SUFFIXES) and not name.startswith(".")
    )


def inside(folder: Path, name: str, table: str) -> Path:
    """`folder`/`name`. Raises ValueError for a name that leads out of the folder, with the table that holds it."""
    parts = PurePosixPath(name.replace("\\", "/"))
    if not name or parts.is_absolute() or ".." in parts.parts:
        raise ValueError(f"{table}: the file name {name!r} leads out of {folder}; expected a path inside it.")
    return folder / parts


def first_column(given: str, names: Sequence[str], columns: Sequence[str], table: str, what: str) -> str:
    """A column of a table: the `given` one, or the first of `names` that the table has. Case does not matter.

    what: the column's role and option, for the message. Raises ValueError with the table, the names and its columns.
    """
    there = {column.lower(): column for column in reversed(columns) if column}
    for name in (given,) if given else names:
        if name.lower() in there:
            return there[name.lower()]
    raise ValueError(
        f"{table} has no {what} column: expected {given or ' or '.join(names)}, found {', '.join(map(str, columns))}; "
        f"name it with ?{what}=COLUMN."
    )
