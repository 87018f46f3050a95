"""Tables beside images: CSV, TSV, JSON lines and Parquet, as lists of rows."""

import csv
import io
import json
from pathlib import Path
from typing import Any

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
csv.field_size_limit(1 << 24)


def read_text(path: Path) -> str:
    """The text of a file, without byte-order mark. Raises FileNotFoundError, or ValueError if it is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; check bft.data.") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8.") from None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a table, as column -> value.

    Raises ValueError with the file if it has no rows, is damaged or not UTF-8, or has an unknown extension.
    """
    kind = path.suffix.lower()
    if kind == ".parquet":
        import pyarrow.parquet as pq

        try:
            rows = pq.read_table(path).to_pylist()
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is not a readable Parquet file ({error}).") from None
    elif kind in (".csv", ".tsv"):
        text = read_text(path)
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if kind == ".tsv" else ","))
    elif kind == ".jsonl":
        rows = [
            parse_json(line, f"{path}, line {i}")
            for i, line in enumerate(read_text(path).splitlines(), 1)
            if line.strip()
        ]
    else:
        raise ValueError(f"{path}: {kind or 'no'} extension, expected one of {', '.join(SUFFIXES)}.")
    if not rows:
        raise ValueError(f"{path} holds no rows.")
    return rows


def read_json(path: Path) -> Any:
    """The contents of a JSON file. Raises ValueError with its name if it is damaged."""
    return parse_json(read_text(path), str(path))


def parse_json(text: str, place: str) -> Any:
    """The value of a JSON text. Raises ValueError with `place`, where the text stands."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON ({error}); it may be truncated: fetch it again.") from None


def text_of(value: Any) -> str:
    """A caption as text: the first of several, "" if there is none."""
    if isinstance(value, (list, tuple)):
        value = value[0] if value else None
    return "" if value is None else str(value).strip()
