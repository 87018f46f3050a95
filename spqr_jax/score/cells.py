"""The complete cells of a work directory: their records and features, read and checked.

Every image has its partner before and after fine-tuning, with the same prompt and noise, and all cells were judged by
the same judges in the same way. Records that contradict each other are an error that names the file and the remedy.
"""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from spqr_jax.files import storage

PHASES, ROLES = ("before", "after"), ("harmful", "benign")
UNSAFE = {"unsafe": 1.0, "safe": 0.0, "undecided": float("nan")}
COLUMNS = (
    *("phase", "role", "prompt_set", "prompt_id", "k", "prompt", "category", "language", "image_seed"),
    *("judges", "verdict", "clip_score"),
)
GROUPS = {"categories": "category", "prompt_sets": "prompt_set", "languages": "language"}
Array = NDArray[np.float64]
Prompt = tuple[str, str]  # prompt_set, prompt_id
Key = tuple[str, str, int]  # prompt_set, prompt_id, k


class Cell(NamedTuple):
    path: Path
    info: dict[str, Any]  # cell.json


class Images(NamedTuple):
    """The images of one role in one cell, in the order of `keys`; per phase one value an image, NaN where unknown."""

    keys: list[Key]
    prompts: dict[Prompt, str]  # their text
    groups: dict[str, list[str]]  # "categories", "prompt_sets", "languages" -> [N]
    unsafe: dict[str, Array]  # phase -> [N] 1 unsafe, 0 safe, NaN undecided
    judges: dict[str, dict[str, Array]]  # judge -> phase -> [N], as unsafe
    clip: dict[str, Array]  # phase -> [N]
    features: dict[str, NDArray[np.float32]]  # phase -> [N, D], benign only


def complete_cells(workdir: Path) -> list[list[Cell]]:
    """Complete cells, grouped into rows (one per scenario, profile, subject), each in the order of its seeds."""
    paths = sorted(workdir.glob("cells/*/cell.json"))
    if not paths:
        raise FileNotFoundError(f"{workdir}/cells: no complete cell (cells/*/cell.json); run the cells before score")
    cells = [Cell(path.parent, _cell_info(path)) for path in paths]
    rows: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells:
        _check_same_judges(cells[0], cell)
        rows.setdefault(tuple(str(cell.info[key]) for key in ("scenario", "profile", "subject")), []).append(cell)
    for row in rows.values():
        row.sort(key=lambda cell: int(cell.info["seed"]))
        for first, second in pairwise(row):
            if int(first.info["seed"]) == int(second.info["seed"]):
                raise ValueError(
                    f"cells {first.path.name} and {second.path.name} are of the same subject, profile, scenario and "
                    "seed; remove one of them"
                )
    return [rows[key] for key in sorted(rows)]


def _cell_info(path: Path) -> dict[str, Any]:
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}); remove it and run the cell again") from error
    missing = [key for key in ("subject", "profile", "scenario", "seed", "is_control") if key not in info]
    if missing:
        raise ValueError(f"{path}: {missing[0]!r} is missing; remove it and run the cell again")
    return info


def _check_same_judges(first: Cell, cell: Cell) -> None:
    a, b = first.info.get("judges", {}), cell.info.get("judges", {})
    for judge in sorted(a.keys() | b.keys()):
        if a.get(judge) != b.get(judge):
            raise ValueError(
                f"judge {judge!r} is not the same in cells {first.path.name} and {cell.path.name} "
                f"({_difference(a.get(judge), b.get(judge))}): verdicts of different judges, or of one judge with "
                "different preprocessing, do not compare; judge both cells again with one configuration"
            )
    rules = first.info.get("rule", "union"), cell.info.get("rule", "union")
    if rules[0] != rules[1]:
        raise ValueError(
            f"cells {first.path.name} and {cell.path.name} combine their judges by different rules, {rules[0]!r} and "
            f"{rules[1]!r}; judge both cells again with one configuration"
        )


def _difference(a: Any, b: Any, where: str = "") -> str:
    """The first entry in which two judges' identities differ, as `options.mode: 'native' and 'resize'`."""
    if isinstance(a, dict) and isinstance(b, dict):
        key = next(key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key))
        return _difference(a.get(key), b.get(key), f"{where}.{key}" if where else key)
    return f"{where}{': ' if where else ''}{a!r} and {b!r}"


def read_cell(cell: Cell) -> dict[str, Images]:
    """Records and features of one cell by role, checked: both phases, same prompts and noise, no key twice.

    Raises ValueError naming the file, the first image at fault and what to do.
    """
    path = cell.path / "records.parquet"
    with path.open("rb") as stream, pq.ParquetFile(stream) as file:
        missing = [name for name in COLUMNS if name not in file.schema_arrow.names]
        if missing:
            raise ValueError(f"{path}: column {missing[0]!r} is missing; expected {', '.join(COLUMNS)}")
        table = file.read(columns=list(COLUMNS)).to_pydict()
    rows: dict[tuple[str, str], dict[Key, int]] = {(role, phase): {} for role in ROLES for phase in PHASES}
    for i, where in enumerate(zip(table["role"], table["phase"], strict=True)):
        key = (table["prompt_set"][i], table["prompt_id"][i], table["k"][i])
        if where not in rows:
            raise ValueError(f"{path}: row {i} has role and phase {where}, expected {ROLES} and {PHASES}")
        if key in rows[where]:
            raise ValueError(f"{path}: {where[0]} image {key} occurs twice {where[1]} fine-tuning; run the cell again")
        if table["verdict"][i] not in UNSAFE and where[0] == "harmful":
            raise ValueError(f"{path}: row {i} has verdict {table['verdict'][i]!r}, expected one of {sorted(UNSAFE)}")
        rows[where][key] = i
    for role in ROLES:
        _check_pairs(path, table, role, rows[role, "before"], rows[role, "after"])
    return {role: _images(cell, table, role, rows) for role in ROLES}


def _check_pairs(path: Path, table: dict[str, list], role: str, before: dict[Key, int], after: dict[Key, int]) -> None:
    """Drift is paired: every image must have its partner, with the same prompt text and the same noise."""
    lonely = sorted(before.keys() ^ after.keys())
    if lonely:
        phase = "before" if lonely[0] in before else "after"
        raise ValueError(
            f"{path}: {role} prompts differ before and after: {len(lonely)} images are in one phase only, the first "
            f"{lonely[0]} only {phase}; generate both phases from the same prompts"
        )
    for key, i in before.items():
        for column in ("prompt", "image_seed", "category", "language"):
            first, second = table[column][i], table[column][after[key]]
            if first != second:
                raise ValueError(
                    f"{path}: {role} image {key} has {column} {first!r} before and {second!r} after; "
                    "generate both phases from the same prompts and noise"
                )


def _images(cell: Cell, table: dict[str, list], role: str, rows: dict[tuple[str, str], dict[Key, int]]) -> Images:
    keys = sorted(rows[role, "before"])
    order = {phase: [rows[role, phase][key] for key in keys] for phase in PHASES}
    harmful = role == "harmful"
    return Images(
        keys,
        {key[:2]: table["prompt"][i] for key, i in zip(keys, order["before"], strict=True)},
        {name: [str(table[column][i] or "") for i in order["before"]] for name, column in GROUPS.items()},
        {phase: np.array([UNSAFE[table["verdict"][i]] for i in order[phase]] if harmful else []) for phase in PHASES},
        _judge_verdicts(table["judges"], order) if harmful else {},
        {phase: np.array([table["clip_score"][i] for i in order[phase]], np.float64) for phase in PHASES},
        {} if harmful else {phase: _features(cell, phase, rows[role, phase], keys) for phase in PHASES},
    )


def without_judge(images: Images, judge: str, rule: str) -> dict[str, Array]:
    """phase -> [N] combined verdicts of the other judges, as `Images.unsafe`."""
    from judges import combine  # here: the report reads records without the judges' ONNX Runtime

    words = {1.0: "unsafe", 0.0: "safe"}
    others = {name: phases for name, phases in images.judges.items() if name != judge}
    return {
        phase: np.array(
            [
                UNSAFE[verdict]
                for verdict in combine.combine(
                    {name: [words.get(v, "undecided") for v in phases[phase]] for name, phases in others.items()}, rule
                )
            ]
        )
        for phase in PHASES
    }


def _judge_verdicts(records: list[str | None], order: dict[str, list[int]]) -> dict[str, dict[str, Array]]:
    """judge -> phase -> [N]; a judge that failed on an image, or only scores it, is undecided there."""
    verdicts: dict[str, dict[str, Array]] = {}
    for phase, rows in order.items():
        for position, i in enumerate(rows):
            for judge, record in json.loads(records[i] or "{}").items():
                if isinstance(record, dict) and record.get("verdict") in UNSAFE:
                    unknown = {other: np.full(len(rows), np.nan) for other in order}
                    verdicts.setdefault(judge, unknown)[phase][position] = UNSAFE[record["verdict"]]
    return verdicts


def _features(cell: Cell, phase: str, rows: dict[Key, int], keys: list[Key]) -> NDArray[np.float32]:
    """Features [N, D] in the order of keys; the file has them in the order of the phase's benign rows."""
    path, name = cell.path / "features.npz", f"{phase}_benign"
    arrays = storage.read_npz(path)
    if name not in arrays:
        raise ValueError(f"{path}: array {name!r} is missing, found {sorted(arrays)}; judge the cell again")
    features = arrays[name]
    if keys and (features.ndim != 2 or len(features) != len(keys)):
        raise ValueError(f"{path}: {name} must be [{len(keys)}, D], one row per benign image, found {features.shape}")
    if not np.all(np.isfinite(features)):
        raise ValueError(f"{path}: {name} has NaN or infinite values; judge the cell again")
    position = {key: n for n, key in enumerate(sorted(rows, key=rows.__getitem__))}
    return features[[position[key] for key in keys]] if keys else features
