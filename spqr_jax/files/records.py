"""The records of a run: the columns of records.parquet and drift.parquet, and how these files are written and read.

records.parquet holds one row an image. Scores and reports are computed from it, so that a new score never needs a new
image. drift.parquet holds one row an image and step, for cells that were judged during their fine-tuning. A row is a
`Record` or a `DriftRecord`; the columns of the files are the fields of these two classes, and nobody else lists them.
docs/records.md shows how to query the files.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq

from spqr_jax.files import storage

PHASES = ("before", "after")
ROLES = ("harmful", "benign")


class Record(TypedDict):
    """A row of records.parquet: one image, its origin, and the answers of the judges about it."""

    cell: str
    """Id of the cell: its subject, profile, scenario, seed and a hash of all that determines its results. Empty in the
    records of a subject, which all of its cells share."""
    subject: str
    """Name of the subject, as in the config."""
    profile: str
    """Name of the fine-tuning profile: lite, moderate, standard, or one of ours. Empty in the records of a subject."""
    scenario: str
    """Name of the fine-tuning scenario, as in the config. Empty in the records of a subject."""
    seed: int
    """Seed of the benign fine-tuning, 0 or more."""
    phase: str
    """`before` or `after` the benign fine-tuning, one of PHASES."""
    prompt_set: str
    """Name of the prompt set."""
    role: str
    """`harmful` or `benign`, one of ROLES."""
    prompt_id: str
    """Id of the prompt, unique within its prompt set."""
    k: int
    """Number of the image among the images of its prompt, from 0. The columns role, prompt_set, prompt_id and k say
    which image before fine-tuning belongs to which image after it."""
    prompt: str
    """Text of the prompt."""
    category: str
    """Category of harm, as in the prompt set. Empty where the prompt has none."""
    language: str
    """Language of the prompt, as in the prompt set. Empty where it is not given."""
    image_seed: int
    """Seed of the initial noise, 0 to 2**32 - 1. An image before and its partner after have the same one."""
    image: str
    """Path of the PNG, relative to the directory of records.parquet."""
    judges: str
    """JSON object: the name of every safety judge and its answer about the image."""
    verdict: str
    """`safe`, `unsafe` or `undecided`: the answers of all safety judges combined."""
    clip_score: float
    """Cosine of image and prompt under CLIP, -1 to 1. NaN for images of harmful prompts, where it is not computed."""


class DriftRecord(TypedDict):
    """A row of drift.parquet: one image that was made at one step of a fine-tuning, judged, and not kept."""

    step: int
    """Fine-tuning steps done when the image was made. 0 is the model before fine-tuning."""
    role: str
    """As in `Record`."""
    prompt_set: str
    """As in `Record`."""
    prompt_id: str
    """As in `Record`."""
    k: int
    """As in `Record`."""
    category: str
    """As in `Record`."""
    verdict: str
    """As in `Record`."""


class Kind(NamedTuple):
    """A kind of file: its columns, and the remedy for a file of this kind that cannot be used."""

    schema: pa.Schema
    remedy: str


def _schema(row: type) -> pa.Schema:
    types = {str: pa.string(), int: pa.int64(), float: pa.float64()}
    return pa.schema([(name, types[kind]) for name, kind in get_type_hints(row).items()])


IMAGES = Kind(_schema(Record), "delete the file and run the same command again")
DRIFT = Kind(_schema(DriftRecord), "delete the directory of the cell and run the same command again")


def write(path: Path, rows: Sequence[Mapping[str, Any]], kind: Kind = IMAGES) -> None:
    """Write rows in the columns of their kind. The file is complete or it does not exist.

    Raises KeyError for a row that lacks one of the columns.
    """
    write_table(path, pa.table({name: [row[name] for row in rows] for name in kind.schema.names}, schema=kind.schema))


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table as it is. The file is complete or it does not exist."""
    with storage.writing(path) as stream:
        pq.write_table(table, stream)


def read(path: Path, kind: Kind = IMAGES) -> list[dict[str, Any]]:
    """All rows of a file with all of its columns. Raises ValueError as `read_table` does."""
    return read_table(path, kind.schema.names, kind).to_pylist()


def read_table(path: Path, columns: Sequence[str], kind: Kind = IMAGES) -> pa.Table:
    """The named columns of a file, in their order and with their types. Nothing else is read.

    Raises ValueError for a file that cannot be read, lacks a column, or holds another type. The message names the file,
    the fault and the remedy.
    """
    table, problem = read_leniently(path, columns)
    if table is not None and not problem:
        for name in columns:
            wanted, column = kind.schema.field(name), table.column(name)
            try:
                table = table.set_column(table.column_names.index(name), wanted, column.cast(wanted.type))
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                problem = f"column {name!r} holds {column.type}, expected {wanted.type}"
                break
    if table is None or problem:
        raise ValueError(f"{path}: {problem}; {kind.remedy}.")
    return table


def read_leniently(path: Path, columns: Sequence[str], *, optional: Sequence[str] = ()) -> tuple[pa.Table | None, str]:
    """The readable part of a file, and a text that describes the faults of the rest. Raises no error.

    columns: the columns that the caller needs. optional: columns that it also takes if they are there.
    Returns the table of those columns that the file has, in the types that it has. The text does not name the path, and
    is empty if all needed columns are there. The table is None for a file that cannot be read at all.
    """
    try:
        with path.open("rb") as stream, pq.ParquetFile(stream) as file:
            there = file.schema_arrow.names
            table = file.read(columns=[name for name in (*columns, *optional) if name in there])
    except (OSError, pa.ArrowException) as error:
        return None, f"cannot be read ({type(error).__name__})"
    absent = [name for name in columns if name not in there]
    return table.select([name for name in (*columns, *optional) if name in there]), (
        f"columns {absent} are missing" if absent else ""
    )
