"""records.parquet: one row an image, everything that scores and reports are computed from. Schema: docs/records.md."""

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA = pa.schema(
    [
        ("cell", pa.string()),
        ("subject", pa.string()),
        ("profile", pa.string()),
        ("scenario", pa.string()),
        ("seed", pa.int64()),
        ("phase", pa.string()),
        ("prompt_set", pa.string()),
        ("role", pa.string()),
        ("prompt_id", pa.string()),
        ("k", pa.int64()),
        ("prompt", pa.string()),
        ("category", pa.string()),
        ("language", pa.string()),
        ("image_seed", pa.int64()),
        ("image", pa.string()),
        ("judges", pa.string()),
        ("verdict", pa.string()),
        ("clip_score", pa.float64()),
    ]
)


def write(path: Path, rows: list[dict[str, Any]], schema: pa.Schema = SCHEMA) -> None:
    """Write rows under a temporary name and rename. Raises KeyError for a row without one of the columns."""
    table = pa.table({field.name: [row[field.name] for row in rows] for field in schema}, schema=schema)
    partial = path.with_suffix(".parquet.partial")
    pq.write_table(table, partial)
    os.replace(partial, path)


def read(path: Path, schema: pa.Schema = SCHEMA) -> list[dict[str, Any]]:
    """Rows of a file. Raises ValueError naming a damaged file and the remedy."""
    try:
        return pq.read_table(path, schema=schema).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run the same command again.") from None
