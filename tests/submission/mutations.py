"""Random single changes of a bundle, as an accident, a careless cheater and careful ones would make them.

A change is made to one value, one row, one byte or one file. Then nothing more is done ("naive"). Or sizes and hashes
of the index are rewritten to fit the files ("indexed"). Or every digest is, and the id, as if the project's own code
had written the bundle ("sealed"). Or the scores are computed again as well, where that can be done ("scored"). What is
sealed or scored has another id, and passes where it contradicts nothing else.
"""

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from spqr_jax.files import records, storage
from spqr_jax.submission import bundle as bundle_lib
from spqr_jax.submission import documents, places, scores
from spqr_jax.submission.bundle import Bundle
from tests.submission.conftest import copy

SEALS = ("naive", "indexed", "sealed", "scored")


class Change(NamedTuple):
    """A change that was made: its kind, the file, and the place in it."""

    seal: str
    file: str
    place: str


def change(source: Path, read: Bundle, target: Path, rng: np.random.Generator) -> Change:
    """Write a copy of a bundle with one random change into `target`, which is emptied before. read: what it says."""
    storage.remove(target)
    seal = str(rng.choice(SEALS))
    if rng.random() < (0.4 if seal in ("naive", "indexed") else 0.1):
        copy(source, target)
        file, place = _bytes_changed(target, rng, seal) if rng.random() < 0.75 else _files_changed(target, rng)
    else:
        file, place, changed = _value_changed(read, rng)
        if seal in ("sealed", "scored"):
            sealed(changed if file == places.LEADERBOARD else _restated(changed, seal), target)
            return Change(seal, file, place)
        copy(source, target)
        _write_one(changed, file, target)
    if seal == "indexed":
        reindexed(target)
    elif seal != "naive":
        bundle_lib.write_index(target)
    return Change(seal, file, place)


def _restated(changed: Bundle, seal: str) -> Bundle:
    """The bundle with its own evidence stated, and with its own scores where they can be computed."""
    if seal == "scored":
        with contextlib.suppress(Exception):
            return changed._replace(leaderboard=scores.recomputed(changed))
    return stating_its_evidence(changed)


def stating_its_evidence(changed: Bundle) -> Bundle:
    """The bundle with the digest of its own evidence in its leaderboard."""
    return changed._replace(leaderboard=changed.leaderboard | {scores.EVIDENCE: changed.evidence})


def sealed(changed: Bundle, target: Path) -> Path:
    """Write a bundle with an index and an id that fit, without any check, in place of what is there."""
    storage.remove(target)
    bundle_lib.write_files(changed, target)
    bundle_lib.write_index(target)
    return target


def _write_one(changed: Bundle, file: str, target: Path) -> None:
    """Write one file of a changed bundle over that of a copy."""
    cells = tuple(cell for cell in changed.cells if file.startswith(f"cells/{cell.name}/"))
    aside = target.with_name("aside")
    bundle_lib.write_files(changed._replace(cells=cells), aside)
    (target / file).write_bytes((aside / file).read_bytes())
    storage.remove(aside)


def reindexed(path: Path) -> None:
    """Rewrite sizes and hashes of the index to fit the files that are there."""
    try:
        head = json.loads((path / "submission.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    there = [file for file in sorted(path.rglob("*")) if file.is_file() and file.name != "submission.json"]
    files = {f.relative_to(path).as_posix(): {"bytes": f.stat().st_size, "sha256": storage.sha256(f)} for f in there}
    head |= {"files": files, "bytes": sum(entry["bytes"] for entry in files.values())}
    (path / "submission.json").write_bytes(documents.dumps(head))


def _bytes_changed(target: Path, rng: np.random.Generator, seal: str) -> tuple[str, str]:
    """seal: but for "naive", the index is written again, so that a change of it is none."""
    kept = () if seal == "naive" else (places.INDEX,)
    files = [file for file in sorted(target.rglob("*")) if file.is_file() and file.name not in kept]
    file = files[rng.integers(len(files))]
    data, at = bytearray(file.read_bytes()), 0
    at = int(rng.integers(len(data)))
    kind = str(rng.choice(["flip", "insert", "delete", "cut"]))
    if kind == "flip":
        data[at] ^= 1 << int(rng.integers(8))
    elif kind == "insert":
        data.insert(at, int(rng.integers(256)))
    elif kind == "delete":
        del data[at]
    else:
        del data[at:]
    file.write_bytes(data)
    return file.relative_to(target).as_posix(), f"{kind} byte {at}"


def _files_changed(target: Path, rng: np.random.Generator) -> tuple[str, str]:
    files = [file for file in sorted(target.rglob("*")) if file.is_file()]
    file = files[rng.integers(len(files))]
    name = file.relative_to(target).as_posix()
    kind = str(rng.choice(["remove", "rename", "add", "double", "swap"]))
    if kind == "remove":
        file.unlink()
    elif kind == "rename":
        file.rename(file.with_name(file.name + "x"))
    elif kind == "add":
        (file.parent / "more.json").write_text("{}\n")
    elif kind == "double":
        cell = sorted((target / "cells").iterdir())[0]
        copy(cell, cell.with_name(cell.name + "-1"))
    else:
        first, second = sorted((target / "cells").glob("*/records.parquet"))[:2]
        one, other = first.read_bytes(), second.read_bytes()
        first.write_bytes(other)
        second.write_bytes(one)
    return name, kind


# Values


def _value_changed(read: Bundle, rng: np.random.Generator) -> tuple[str, str, Bundle]:
    kind = str(rng.choice(["manifest", "prompts", "leaderboard", "info", "records", "features", "drift", "reference"]))
    if kind in ("manifest", "prompts", "leaderboard"):
        value, place = _json_changed(getattr(read, kind), rng)
        return f"{kind}.json", place, read._replace(**{kind: value})
    if kind == "reference":
        arrays, place = _array_changed(read.reference, rng)
        return "reference_features.npz", place, read._replace(reference=read.reference | arrays)
    i = int(rng.integers(len(read.cells)))
    cell = read.cells[i]
    changes: dict[str, Callable[..., Any]] = {
        "info": lambda value: _json_changed(value, rng),
        "records": lambda value: _table_changed(value, records.IMAGES.schema, rng),
        "drift": lambda value: _table_changed(value, records.DRIFT.schema, rng),
        "features": lambda value: _array_changed(value, rng),
    }
    value, place = changes[kind](getattr(cell, kind))
    cells = (*read.cells[:i], cell._replace(**{kind: value}), *read.cells[i + 1 :])
    ends = {"info": "cell.json", "records": "records.parquet", "drift": "drift.parquet", "features": "features.npz"}
    return f"cells/{cell.name}/{ends[kind]}", place, read._replace(cells=cells)


def _json_changed(value: Any, rng: np.random.Generator) -> tuple[Any, str]:
    """A copy with one leaf changed or taken away, and its place."""
    value = json.loads(json.dumps(value))
    leaves = list(_leaves(value, ""))
    holder, key, place = leaves[rng.integers(len(leaves))]
    if rng.random() < 0.05:
        del holder[key]
        return value, f"{place} taken away"
    holder[key] = _other(holder[key], rng)
    return value, place


def _leaves(value: Any, place: str) -> Any:
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        where = f"{place}.{key}" if place else str(key)
        if isinstance(value[key], (dict, list)) and value[key]:
            yield from _leaves(value[key], where)
        else:
            yield value, key, where


def _other(value: Any, rng: np.random.Generator) -> Any:
    """Another value of the same type, close to it."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + int(rng.choice([-1, 1, 10]))
    if isinstance(value, float):
        if math.isnan(value):
            return 0.25
        options = [math.nextafter(value, math.inf), value * 1.001 + 1e-9, -value - 1e-9, round(value, 2) + 0.01]
        return float(options[rng.integers(len(options))])
    if isinstance(value, str):
        others = {"safe": "unsafe", "unsafe": "safe", "undecided": "safe"}
        return others.get(value, value + "0" if rng.random() < 0.5 or not value else value[:-1] + "~")
    return 1 if value is None else [1]


def _table_changed(table: pa.Table, schema: pa.Schema, rng: np.random.Generator) -> tuple[pa.Table, str]:
    rows = table.to_pylist()
    i, kind = int(rng.integers(len(rows))), rng.random()
    if kind < 0.05:
        rows.insert(i, dict(rows[i]))
        place = f"row {i} doubled"
    elif kind < 0.1:
        del rows[i]
        place = f"row {i} taken away"
    elif kind < 0.15:
        rows[i], rows[i - 1] = rows[i - 1], rows[i]
        place = f"row {i} moved"
    else:
        column = str(rng.choice(schema.names))
        place = f"{column}, row {i}"
        if column == "judges" and rng.random() < 0.8:
            answers, leaf = _json_changed(json.loads(rows[i]["judges"]), rng)
            rows[i]["judges"], place = json.dumps(answers, sort_keys=True), f"{place}, {leaf}"
        else:
            rows[i][column] = _other(rows[i][column], rng)
    return pa.table({name: [row[name] for row in rows] for name in schema.names}, schema=schema), place


def _array_changed(arrays: dict[str, np.ndarray], rng: np.random.Generator) -> tuple[dict[str, np.ndarray], str]:
    name = str(rng.choice(sorted(arrays)))
    array = arrays[name].copy()
    if array.dtype.kind == "U":
        return arrays | {name: np.array(_other(str(array), rng))}, name
    at = tuple(int(rng.integers(n)) for n in array.shape)
    step = rng.random()
    array[at] = np.nextafter(array[at], np.inf) if step < 0.4 else array[at] + 0.1 if step < 0.9 else np.nan
    return arrays | {name: array}, f"{name}{list(at)}"
