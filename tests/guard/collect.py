"""One run of `launch.py` on the guard's config, and everything it wrote as one JSON-able dict.

The run is a black box: a process of its own with an environment of its own, of which the files alone are read. Subjects
and cells go by what they are ("SPM", "SPM x lite x general x 42"), never by their ids, so that other ids show up once,
under "ids".
"""

import hashlib
import importlib.metadata
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow.parquet as pq
from orbax.checkpoint import v1 as ocp
from PIL import Image

from tests.guard import programs

ROOT = Path(__file__).parents[2]
CONFIG = Path("tests", "guard", "config.py")
# Compilation takes most of the time. How many parts the CPU is split into is left to the config.
FLAGS = "--xla_backend_optimization_level=1 --xla_llvm_disable_expensive_passes=true"
PASSED_ON = ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH", "SYSTEMROOT")
VERDICTS = {"safe": "s", "unsafe": "U", "undecided": "?"}
TIMED = ("seconds", "rates", "samples_per_s")  # fields that say how long something took
Json = dict[str, Any]


def run(workdir: Path, cache: Path) -> None:
    """The run, into `workdir`, with its programs beside it. Raises RuntimeError with what it said.

    cache: of compiled programs. A program from there is dumped as one that is compiled.
    """
    environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ} | {
        "PYTHONPATH": str(ROOT),
        "PYTHONHASHSEED": "0",
        "LC_ALL": "C.UTF-8",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_DUMP_IR_TO": str(dumps_of(workdir)),
        "JAX_DUMP_IR_MODES": "stablehlo",
        "JAX_INCLUDE_DEBUG_INFO_IN_DUMPS": "false",
        "XLA_FLAGS": FLAGS,
    }
    command = [sys.executable, "launch.py", "--config", str(CONFIG), "--workdir", str(workdir)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")


def dumps_of(workdir: Path) -> Path:
    """Where a run's programs are dumped: not among what it writes."""
    return workdir.with_name(workdir.name + ".programs")


def collect(workdir: Path) -> Json:
    """Everything that a run wrote and that does not depend on when and where it ran.

    versions, ids, programs, verdicts, drift and leaderboard are the same on every machine, the last one but for
    rounding; exact is one machine's: hashes of pictures, weights, records, features, logs and reports.
    """
    labels = labels_of(workdir)
    ids: Json = {"subjects": {}, "cells": {}, "pipelines": {}}
    for directory, label in labels.items():
        ids[directory.parent.name][label] = directory.name
    tables = {f"{d.parent.name}/{label}": d for d, label in labels.items() if d.parent.name != "pipelines"}
    return {
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")},
        "ids": ids,
        "programs": programs.read(dumps_of(workdir)),
        "verdicts": {name: _verdicts(directory / "records.parquet") for name, directory in tables.items()},
        "drift": {n: _verdicts(d / "drift.parquet") for n, d in tables.items() if (d / "drift.parquet").exists()},
        "leaderboard": json.loads((workdir / "leaderboard.json").read_text(encoding="utf-8")),
        "exact": dict(sorted(_exact(workdir, labels))),
    }


def labels_of(workdir: Path) -> dict[Path, str]:
    """Directory of a pipeline, subject or cell -> what it is called here."""
    labels = {}
    for path in sorted(workdir.glob("pipelines/*/pipeline.json")):
        labels[path.parent] = str(json.loads(path.read_text(encoding="utf-8"))["subject"])
    for path in sorted(workdir.glob("subjects/*/records.parquet")):
        labels[path.parent] = str(pq.read_table(path)["subject"][0].as_py())
    for path in sorted(workdir.glob("cells/*/cell.json")):
        cell = json.loads(path.read_text(encoding="utf-8"))
        labels[path.parent] = " x ".join(str(cell[key]) for key in ("subject", "profile", "scenario", "seed"))
    return labels


def pictures(workdir: Path) -> dict[str, np.ndarray]:
    """A few pictures, uint8 [H, W, 3]: a benign one of every subject and a harmful one of every cell."""
    chosen = {}
    for directory, label in labels_of(workdir).items():
        kind = {"subjects": "before_benign", "cells": "after_harmful"}.get(directory.parent.name)
        if kind:
            path = min((directory / "images" / kind).iterdir())
            chosen[f"{directory.parent.name}/{label}/{path.name}"] = np.asarray(Image.open(path))
    return chosen


def _verdicts(path: Path) -> dict[str, str]:
    """Verdicts of a table, a letter a picture, by phase or step and by role."""
    letters: dict[str, str] = {}
    rows = pq.read_table(path).to_pylist()
    for row in sorted(rows, key=lambda row: (row.get("phase", ""), row.get("step", 0), row["prompt_id"], row["k"])):
        name = f"{row.get('phase', row.get('step'))} {row['role']}"
        letters[name] = letters.get(name, "") + VERDICTS[row["verdict"]]
    return dict(sorted(letters.items()))


def _exact(workdir: Path, labels: dict[Path, str]) -> Iterator[tuple[str, Any]]:
    """(name of a file or of saved weights, hash or hashes) of everything that is the same in every run."""
    saved = {path.parent for path in workdir.rglob("_CHECKPOINT_METADATA")}
    for directory in saved:
        yield _name(directory, workdir, labels), _weights(directory)
    for path in workdir.rglob("*"):
        if path.is_dir() or saved.intersection(path.parents):
            continue
        name = _name(path, workdir, labels)
        if path.suffix == ".png" or name.endswith("adapter.safetensors") or name.startswith("report/tables"):
            yield name, hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.suffix == ".parquet":
            table = pq.read_table(path)
            rows = [{k: v for k, v in row.items() if k != "cell"} for row in table.to_pylist()]
            yield name, digest(str(table.schema.remove_metadata()), rows)
        elif path.suffix == ".npz":
            yield name, _arrays(path)
        elif path.name in ("steps.jsonl", "cell.json", "pipeline.json", "attached.json", "judges.json"):
            lines = path.read_text(encoding="utf-8")
            values = [json.loads(line) for line in lines.splitlines()] if path.suffix == ".jsonl" else json.loads(lines)
            yield name, digest(_untimed(values))
        elif path.name == "manifest.json":
            said = json.loads(path.read_text(encoding="utf-8"))
            yield name, {key: digest(said[key]) for key in ("config", "judges", "mini", "sha256")}


def _name(path: Path, workdir: Path, labels: dict[Path, str]) -> str:
    """A path within the work directory, with labels in the place of ids."""
    for directory in (path, *path.parents):
        if directory in labels:
            return f"{directory.parent.name}/{labels[directory]}/{path.relative_to(directory)}".removesuffix("/.")
    return str(path.relative_to(workdir))


def _weights(directory: Path) -> Json:
    """Names and contents of saved arrays, each a hash, so that other names for the same arrays can be told."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    stored = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), ocp.metadata(directory).metadata
    )
    leaves = jax.tree_util.tree_leaves_with_path(ocp.load(directory, stored))
    return {
        "arrays": len(leaves),
        "names": digest(sorted(jax.tree_util.keystr(path) for path, _ in leaves)),
        "content": digest(sorted(_array(np.asarray(leaf)) for _, leaf in leaves)),
    }


def _arrays(path: Path) -> Json:
    """Hash of every array of an .npz file; its own bytes hold the time of writing."""
    with zipfile.ZipFile(path) as file:
        return {name: _array(np.load(io.BytesIO(file.read(name)))) for name in sorted(file.namelist())}


def _array(array: np.ndarray) -> str:
    return digest(str(array.dtype), array.shape, hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest())


def _untimed(value: Any) -> Any:
    """A JSON value without ids and times."""
    if isinstance(value, list):
        return [_untimed(item) for item in value]
    if isinstance(value, dict):
        return {key: _untimed(item) for key, item in value.items() if key not in TIMED and key != "cell"}
    return value


def digest(*parts: Any) -> str:
    """Sixteen hex digits over JSON-able values; floats count to the last bit."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
