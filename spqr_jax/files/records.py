"""records.parquet: one row an image, everything that scores and reports are computed from. Schema: docs/records.md."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from spqr_jax.files import storage

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
    """Write rows, the file whole or not at all. Raises KeyError for a row without one of the columns."""
    table = pa.table({field.name: [row[field.name] for row in rows] for field in schema}, schema=schema)
    with storage.writing(path) as stream:
        pq.write_table(table, stream)


def read(path: Path, schema: pa.Schema = SCHEMA) -> list[dict[str, Any]]:
    """Rows of a file. Raises ValueError naming a damaged file and the remedy."""
    try:
        with path.open("rb") as stream:
            return pq.read_table(stream, schema=schema).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run the same command again.") from None
