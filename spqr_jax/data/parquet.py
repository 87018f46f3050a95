"""Parquet files that hold images, as public hubs serve them: whole splits or single files."""

import json
import os
import tempfile
import threading
from collections import defaultdict
from collections.abc import Sequence
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spqr_jax.data.source import Source, first_column, inside
from spqr_jax.data.tables import text_of
from spqr_jax.data.templates import filler, label_of

CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "en", "sentences_raw", "sentences", "title")
LANGUAGE_COLUMNS = ("language", "lang", "image_locale", "locale")
LABEL_COLUMNS = ("style", "label", "labels", "artist", "genre")


class Place(NamedTuple):
    """The place of a row: file, number of its row group, number of the row in the group."""

    file: Path
    group: int
    row: int


def files(path: Path) -> list[Path]:
    """The Parquet files of a path: one file, all under a folder, or the matches of a pattern (`data/train-*`)."""
    if path.is_dir():
        return sorted(path.rglob("*.parquet"))
    found = [path] if path.is_file() else [Path(name) for name in sorted(glob(str(path)))]
    return [file for file in found if file.suffix.lower() == ".parquet"]


def open_parquet(
    path: Path, *, image: str = "", caption: str = "", language: str = "", label: str = "", template: str = ""
) -> Source:
    """Captioned images of Parquet files.

    image: column of images (bytes, or a struct of bytes and path), default the first such. caption: column of texts, or
    of lists of which the first text counts. language: takes the caption column of this name, or the rows whose language
    column holds it. template: makes captions from the column `label` instead; its {label} is the column's text, or the
    class name in the schema. Raises FileNotFoundError without a file, ValueError with file and column.
    """
    found = files(path)
    if not found:
        raise FileNotFoundError(f"{path} names no Parquet file.")
    captions: list[str] = []
    places: list[Place] = []
    for file in found:
        table = open_file(file)
        image = image or _image_column(table.schema_arrow, file)
        texts = _labels(table, label, template, file) if template else _captions(table, caption, language, file)
        rows = [
            Place(file, g, r) for g in range(table.num_row_groups) for r in range(table.metadata.row_group(g).num_rows)
        ]
        kept = [i for i, text in enumerate(texts) if text is not None]
        captions += [texts[i] or "" for i in kept]
        places += [rows[i] for i in kept]
    if not captions:
        raise ValueError(f"{path} holds no rows{f' in language {language}' if language else ''}.")
    reader = Reader(places, image)
    where = tuple(f"{p.file}, row group {p.group}, row {p.row}" for p in places)
    rule = f"template {template!r}" if template else "first caption of each row"
    return Source(f"parquet:{path}", tuple(captions), where, reader, rule, reader.prefetch)


def open_file(file: Path):
    """An opened ParquetFile. Raises ValueError for a file that is none."""
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{file} is not a readable Parquet file ({error}); it may be truncated: fetch it again."
        ) from None


def _image_column(schema: Any, file: Path) -> str:
    import pyarrow as pa

    for field in schema:
        kind = field.type
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            return field.name
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            return field.name
    raise ValueError(f"{file} has no column of images; it has {', '.join(schema.names)}. Name it with ?image=COLUMN.")


def has_pictures(file: Path) -> bool:
    """Whether a Parquet file has a column of images."""
    try:
        return bool(_image_column(open_file(file).schema_arrow, file))
    except ValueError:
        return False


def _captions(table, caption: str, language: str, file: Path) -> list[str | None]:
    """One caption a row; None for a row in another language."""
    names = table.schema_arrow.names
    own = not caption and language.lower() in {name.lower() for name in names}
    column = first_column(language if own else caption, CAPTION_COLUMNS, names, str(file), "caption")
    spoken = None if own or not language else first_column("", LANGUAGE_COLUMNS, names, str(file), "language")
    read = table.read(columns=[column, *([spoken] if spoken else [])])
    texts = [text_of(value) for value in read.column(column).to_pylist()]
    if spoken is None:
        return list(texts)
    said = read.column(spoken).to_pylist()
    return [text if str(s).lower() == language.lower() else None for text, s in zip(texts, said, strict=True)]


def _labels(table, label: str, template: str, file: Path) -> list[str | None]:
    column = first_column(label, LABEL_COLUMNS, table.schema_arrow.names, str(file), "label")
    fill, names = filler(template, "parquet", ("label",)), class_names(table.schema_arrow, column)
    values = table.read(columns=[column]).column(column).to_pylist()
    return [fill(label=label_of(names[v] if names and isinstance(v, int) else str(v))) for v in values]


def class_names(schema: Any, column: str) -> list[str]:
    """The class names of a label column, from the schema's metadata `huggingface`; empty if there are none."""
    stored = (schema.metadata or {}).get(b"huggingface")
    feature = json.loads(stored)["info"]["features"].get(column, {}) if stored else {}
    return list(feature.get("names", ())) if isinstance(feature, dict) else []


class Reader:
    """row -> bytes of its image.

    `prefetch` copies rows out of their row groups into a temporary file, each group read once. A draw takes rows from
    all over the files, and reading a group (some 50 MB) for each row would take hours.
    """

    def __init__(self, places: Sequence[Place], image: str):
        self.places, self.image = places, image
        self.spool = tempfile.TemporaryFile(prefix="pictures-")  # noqa: SIM115 (lives as long as the reader)
        self.spans: dict[int, tuple[int, int]] = {}
        self.lock = threading.Lock()

    def prefetch(self, rows: Sequence[int]) -> None:
        """Copies the images of these rows into the temporary file."""
        groups = defaultdict(list)
        for row in rows:
            if row not in self.spans:
                groups[self.places[row].file, self.places[row].group].append(row)
        for (file, group), wanted in sorted(groups.items()):
            column = open_file(file).read_row_group(group, columns=[self.image]).column(0)
            for row in wanted:
                self._keep(row, picture_bytes(column[self.places[row].row].as_py(), file))

    def _keep(self, row: int, content: bytes) -> None:
        with self.lock:
            start = self.spool.seek(0, os.SEEK_END)
            self.spool.write(content)
            self.spool.flush()
            self.spans[row] = (start, len(content))

    def __call__(self, row: int) -> bytes:
        if row not in self.spans:
            self.prefetch([row])
        start, size = self.spans[row]
        return os.pread(self.spool.fileno(), size, start)


def picture_bytes(value: Any, file: Path) -> bytes:
    """The encoded image in a cell, or in the file that the cell names; b"" for an empty cell or a missing file."""
    if isinstance(value, dict):
        if value.get("bytes") is None and value.get("path"):
            external = inside(file.parent, str(value["path"]), str(file))
            return external.read_bytes() if external.is_file() else b""
        value = value.get("bytes")
    if isinstance(value, np.ndarray):
        value = value.tobytes()
    return value or b""
