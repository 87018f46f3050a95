"""The complete cells of a work directory: their records and features, read and checked.

Every image before fine-tuning has a partner after it, with the same prompt and the same noise. All cells were judged by
the same judges in the same way. Records that contradict each other raise an error that names the file and the remedy.
"""

import json
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from spqr_jax.files import records, storage
from spqr_jax.files.layout import CellFolder, Workdir
from spqr_jax.files.records import PHASES, ROLES
from spqr_jax.protocols import Statement

UNSAFE = {"unsafe": 1.0, "safe": 0.0, "undecided": float("nan")}
COLUMNS = (  # of records.parquet: those that scores are computed from
    *("phase", "role", "prompt_set", "prompt_id", "k", "prompt", "category", "language", "image_seed"),
    *("judges", "verdict", "clip_score"),
)
SLICES = {"categories": "category", "prompt_sets": "prompt_set", "languages": "language"}  # name on a row: column
Array = NDArray[np.float64]
PromptKey = tuple[str, str]  # prompt_set, prompt_id
ImageKey = tuple[str, str, int]  # prompt_set, prompt_id, k


class FinishedCell(NamedTuple):
    """A complete cell: one subject, fine-tuned once under one profile on one scenario, and judged."""

    name: str  # of its directory
    subject: str
    profile: str
    scenario: str
    seed: int  # of the fine-tuning
    info: dict[str, Any]  # cell.json as it is
    folder: CellFolder

    @property
    def row(self) -> str:
        """The name of the row that this cell belongs to: the same for cells that differ in their seed only."""
        return f"{self.subject} / {self.profile} / {self.scenario}"

    @property
    def judges(self) -> dict[str, Any]:
        """What identifies each judge, by its name."""
        return self.info.get("judges") or {}

    @property
    def protocol(self) -> Statement:
        """The protocol that the cell follows. Its name is "" where cell.json does not say it."""
        stated = self.info.get("protocol") or {}
        return Statement(str(stated.get("name", "")), dict(stated.get("changed") or {}))

    @property
    def rule(self) -> str:
        """How the verdicts of the safety judges are combined."""
        return str(self.info.get("rule", "union"))


class Images(NamedTuple):
    """The images of one role in one cell, in the order of `keys`.

    Every array has one value an image and phase; NaN where the value is not known.
    """

    keys: list[ImageKey]
    prompts: dict[PromptKey, str]  # text of each prompt
    slices: dict[str, list[str]]  # "categories", "prompt_sets", "languages" -> [N]
    unsafe: dict[str, Array]  # phase -> [N] 1 unsafe, 0 safe, NaN undecided
    judges: dict[str, dict[str, Array]]  # judge -> phase -> [N], as unsafe
    counted_safe: dict[str, int]  # phase -> undecided images that the authors' code counts as safe
    clip: dict[str, Array]  # phase -> [N]
    features: dict[str, NDArray[np.float32]]  # phase -> [N, D], of benign images only


def finished_cell(folder: CellFolder, info: dict[str, Any]) -> FinishedCell:
    """The cell of a directory, from its cell.json. A name that is missing there becomes "unknown", a seed 0."""
    subject, profile, scenario = (str(info.get(name, "unknown")) for name in ("subject", "profile", "scenario"))
    seed = info.get("seed")
    return FinishedCell(folder.name, subject, profile, scenario, seed if isinstance(seed, int) else 0, info, folder)


def complete_cells(workdir: Path) -> list[list[FinishedCell]]:
    """The complete cells of a work directory, one list for each row of the leaderboard.

    A row is a scenario, profile and subject; its cells differ in their fine-tuning seed and are sorted by it.
    Raises FileNotFoundError where no cell is complete, and ValueError for cells that do not belong together.
    """
    cells = [finished_cell(folder, _read_summary(folder.summary)) for folder in Workdir(workdir).complete_cells()]
    if not cells:
        raise FileNotFoundError(f"{workdir}/cells: no complete cell (cells/*/cell.json); run the cells before score")
    rows: dict[tuple[str, str, str], list[FinishedCell]] = {}
    for cell in cells:
        check_same_judges(cells[0], cell)
        rows.setdefault((cell.scenario, cell.profile, cell.subject), []).append(cell)
    for row in rows.values():
        row.sort(key=lambda cell: cell.seed)
        for first, second in pairwise(row):
            if first.seed == second.seed:
                raise ValueError(
                    f"cells {first.name} and {second.name} are of the same subject, profile, scenario and seed; "
                    "remove one of them"
                )
    return [rows[key] for key in sorted(rows)]


def _read_summary(path: Path) -> dict[str, Any]:
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}); remove it and run the cell again") from error
    missing = [key for key in ("subject", "profile", "scenario", "seed", "is_control") if key not in info]
    if missing:
        raise ValueError(f"{path}: {missing[0]!r} is missing; remove it and run the cell again")
    if not isinstance(info["seed"], int):
        raise ValueError(f"{path}: seed must be an integer, found {info['seed']!r}; remove it and run the cell again")
    return info


def check_same_judges(first: FinishedCell, cell: FinishedCell) -> None:
    """Raise ValueError for two cells, or two attacks, whose judges or whose rule for their verdicts differ."""
    a, b = first.judges, cell.judges
    for judge in sorted(a.keys() | b.keys()):
        if a.get(judge) != b.get(judge):
            raise ValueError(
                f"judge {judge!r} is not the same in cells {first.name} and {cell.name} "
                f"({_difference(a.get(judge), b.get(judge))}): verdicts of different judges, or of one judge with "
                "different preprocessing, do not compare; judge both cells again with one configuration"
            )
    if first.rule != cell.rule:
        raise ValueError(
            f"cells {first.name} and {cell.name} combine their judges by different rules, {first.rule!r} and "
            f"{cell.rule!r}; judge both cells again with one configuration"
        )


def _difference(a: Any, b: Any, where: str = "") -> str:
    """The first entry in which the identities of two judges differ, as `options.mode: 'native' and 'resize'`."""
    if isinstance(a, dict) and isinstance(b, dict):
        key = next(key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key))
        return _difference(a.get(key), b.get(key), f"{where}.{key}" if where else key)
    return f"{where}{': ' if where else ''}{a!r} and {b!r}"


def read_images(cell: FinishedCell) -> dict[str, Images]:
    """The images of a cell by role, from its records and features.

    Checked: both phases are there, with the same prompts and noise, and no image occurs twice. Raises ValueError that
    names the file, the first image at fault and what to do.
    """
    path = cell.folder.records
    table = records.read_table(path, COLUMNS).to_pydict()
    keys: list[ImageKey] = list(zip(table["prompt_set"], table["prompt_id"], table["k"], strict=True))
    places: dict[tuple[str, str], list[int]] = {(role, phase): [] for role in ROLES for phase in PHASES}
    for i, where in enumerate(zip(table["role"], table["phase"], strict=True)):
        if where not in places:
            raise ValueError(f"{path}: row {i} has role and phase {where}, expected {ROLES} and {PHASES}")
        places[where].append(i)
    for phase in PHASES:
        _check_verdicts(path, table["verdict"], places["harmful", phase])
    rows = {where: _by_key(path, where, keys, own) for where, own in places.items()}
    found = {}
    for role in ROLES:
        before, after = (rows[role, phase] for phase in PHASES)
        _check_partners(path, role, before, after)
        ordered = sorted(before)
        order = {phase: [rows[role, phase][key] for key in ordered] for phase in PHASES}
        _check_pairs(path, table, role, ordered, order)
        found[role] = _images(cell, table, role, ordered, order)
    return found


def _check_verdicts(path: Path, verdicts: Sequence[str], rows: Sequence[int]) -> None:
    if {verdicts[i] for i in rows} - UNSAFE.keys():
        i = next(i for i in rows if verdicts[i] not in UNSAFE)
        raise ValueError(f"{path}: row {i} has verdict {verdicts[i]!r}, expected one of {sorted(UNSAFE)}")


def _by_key(path: Path, where: tuple[str, str], keys: Sequence[ImageKey], rows: Sequence[int]) -> dict[ImageKey, int]:
    """The row of each image of one role and phase, in their order in the file."""
    found = {keys[i]: i for i in rows}
    if len(found) < len(rows):
        key = next(keys[i] for i in rows if found[keys[i]] != i)
        raise ValueError(f"{path}: {where[0]} image {key} occurs twice {where[1]} fine-tuning; run the cell again")
    return found


def _check_partners(path: Path, role: str, before: dict[ImageKey, int], after: dict[ImageKey, int]) -> None:
    """Drift is paired: every image must have its partner."""
    if before.keys() != after.keys():
        lonely = sorted(before.keys() ^ after.keys())
        phase = "before" if lonely[0] in before else "after"
        raise ValueError(
            f"{path}: {role} prompts differ before and after: {len(lonely)} images are in one phase only, the first "
            f"{lonely[0]} only {phase}; generate both phases from the same prompts"
        )


def _check_pairs(
    path: Path, table: dict[str, list], role: str, keys: list[ImageKey], order: dict[str, list[int]]
) -> None:
    """Partners have the same prompt text and the same noise. order: phase -> rows, in the order of the keys."""
    for column in ("prompt", "image_seed", "category", "language"):
        before, after = ([table[column][i] for i in order[phase]] for phase in PHASES)
        if before != after:
            key, first, second = next(t for t in zip(keys, before, after, strict=True) if t[1] != t[2])
            raise ValueError(
                f"{path}: {role} image {key} has {column} {first!r} before and {second!r} after; "
                "generate both phases from the same prompts and noise"
            )


def _images(
    cell: FinishedCell, table: dict[str, list], role: str, keys: list[ImageKey], order: dict[str, list[int]]
) -> Images:
    harmful = role == "harmful"
    return Images(
        keys,
        {key[:2]: table["prompt"][i] for key, i in zip(keys, order["before"], strict=True)},
        {name: [str(table[column][i] or "") for i in order["before"]] for name, column in SLICES.items()},
        {phase: np.array([UNSAFE[table["verdict"][i]] for i in order[phase]] if harmful else []) for phase in PHASES},
        _judge_verdicts(table["judges"], order) if harmful else {},
        {phase: _counted_safe(cell, table, order[phase]) if harmful else 0 for phase in PHASES},
        {phase: np.array([table["clip_score"][i] for i in order[phase]], np.float64) for phase in PHASES},
        {} if harmful else _features(cell.folder.features, order),
    )


def _counted_safe(cell: FinishedCell, table: dict[str, list], rows: Sequence[int]) -> int:
    """How many of these rows are undecided because a judge failed, which the authors' code counts as safe."""
    asked = [json.loads(table["judges"][i] or "{}") for i in rows if table["verdict"][i] == "undecided"]
    undecided = [answers for answers in asked if answers and all("verdict" in a for a in answers.values())]
    if not undecided:
        return 0
    from judges import failures  # here: the report reads records without the judges' ONNX Runtime

    return failures.images_counted_safe(undecided, cell.rule)


def without_judge(images: Images, judge: str, rule: str) -> dict[str, Array]:
    """The verdicts of all judges except one, combined by `rule`: phase -> [N], as `Images.unsafe`."""
    from judges import combine  # here: the report reads records without the judges' ONNX Runtime

    words = np.array(["safe", "unsafe", "undecided"])
    combined = {}
    for phase in PHASES:
        others = {name: own[phase] for name, own in images.judges.items() if name != judge}
        votes = {name: words[np.nan_to_num(own, nan=2.0).astype(int)].tolist() for name, own in others.items()}
        combined[phase] = np.array([UNSAFE[verdict] for verdict in combine.combine(votes, rule)])
    return combined


def _judge_verdicts(answers: Sequence[str | None], order: dict[str, list[int]]) -> dict[str, dict[str, Array]]:
    """judge -> phase -> [N]. A judge that failed on an image, or answers without a verdict, is undecided there."""
    before, after = (tuple(answers[i] or "{}" for i in order[phase]) for phase in PHASES)
    found = {"before": _known_verdicts(before), "after": _verdicts(after)}
    unknown = np.full(len(before), np.nan)
    judges = dict.fromkeys(judge for own in found.values() for judge in own)
    return {judge: {phase: own.get(judge, unknown) for phase, own in found.items()} for judge in judges}


def _verdicts(answers: tuple[str, ...]) -> dict[str, Array]:
    """judge -> [N]: its verdicts in JSON answers [N]."""
    verdicts: dict[str, Array] = {}
    decode = json.JSONDecoder().decode  # what json.loads calls
    for i, answer in enumerate(answers):
        for judge, own in decode(answer).items():
            if isinstance(own, dict) and (verdict := own.get("verdict")) in UNSAFE:
                if judge not in verdicts:
                    verdicts[judge] = np.full(len(answers), np.nan)
                verdicts[judge][i] = UNSAFE[verdict]
    return verdicts


_known_verdicts = lru_cache(maxsize=64)(_verdicts)  # all cells of a subject have the same answers before fine-tuning


def _features(path: Path, order: dict[str, list[int]]) -> dict[str, NDArray[np.float32]]:
    """phase -> features [N, D] in the order of its rows [N]; the file has them in the order of the benign records."""
    arrays, found = storage.read_npz(path), {}
    for phase, rows in order.items():
        name = f"{phase}_benign"
        if name not in arrays:
            raise ValueError(f"{path}: array {name!r} is missing, found {sorted(arrays)}; judge the cell again")
        features = arrays[name]
        if rows and (features.ndim != 2 or len(features) != len(rows)):
            raise ValueError(
                f"{path}: {name} must be [{len(rows)}, D], one row per benign image, found {features.shape}"
            )
        if not np.all(np.isfinite(features)):
            raise ValueError(f"{path}: {name} has NaN or infinite values; judge the cell again")
        found[phase] = features[np.argsort(np.argsort(rows))] if rows else features
    return found
