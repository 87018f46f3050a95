"""Read finished work directories: leaderboard.json, manifest.json, every complete cell and its records.

Nothing here computes a score: figures come from leaderboard.json, images and verdicts from the records. What is missing
or cannot be read becomes a line in `ReportedRun.gaps`, which the report shows. Only a missing leaderboard is an error.
Several work directories can be read as one; their subjects are then named after the settings in which the runs differ.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pyarrow as pa

from spqr_jax import prompts as prompts_lib
from spqr_jax import protocols, score
from spqr_jax.files import records, storage
from spqr_jax.files.layout import CellFolder, Workdir
from spqr_jax.protocols import PROFILES, TRAINED
from spqr_jax.score.cells import FinishedCell, finished_cell

T = TypeVar("T")
COLUMNS = ("phase", "prompt_set", "role", "prompt_id", "k", "prompt", "category", "image", "judges", "verdict")
OPTIONAL = ("language", "clip_score")


class PairKey(NamedTuple):
    """What an image before and its partner after fine-tuning share: the prompt and, with it, the initial noise."""

    role: str
    prompt_set: str
    prompt_id: str
    k: int


class Setting(NamedTuple):
    """What the manifest of its run says about a subject. Tables over several runs are sorted by it."""

    subject: str  # its own name
    method: str  # in spqr_jax.methods, "" where not known
    backbone: str
    rank: int | None  # of LoRA
    prompts: str  # the harmful prompt set
    varying: tuple[tuple[str, str], ...] = ()  # setting and label, where the runs read together differ


class ReportedRun(NamedTuple):
    """A finished run as the report reads it, or several runs read as one."""

    directory: Path
    leaderboard: dict[str, Any]
    rows: list[dict[str, Any]]
    cells: list[FinishedCell]
    records: dict[str, pa.Table]  # by the name of the cell; without those that cannot be read
    manifest: dict[str, Any]  # of the first
    gaps: list[str]
    settings: dict[str, Setting]  # by subject
    others: dict[str, dict[str, Any]]  # manifests of the other runs, by label
    attacked: list[dict[str, Any]]  # rows of attacks.json; what the attacks found is not read
    probed: list[dict[str, Any]]  # rows of probes.json

    def records_of(self, cell: FinishedCell) -> list[dict[str, Any]]:
        """The records of one cell; none where its file cannot be read."""
        return self.records[cell.name].to_pylist() if cell.name in self.records else []

    @property
    def subjects(self) -> list[str]:
        """Subjects in order of their best place on the leaderboard, then those that only have cells."""
        return unique([row["subject"] for row in self.rows] + [cell.subject for cell in self.cells])

    @property
    def profiles(self) -> list[str]:
        """Profiles on the leaderboard, from the lightest to the heaviest."""
        return sorted(unique([row["profile"] for row in self.rows]), key=profile_order)

    @property
    def protocol(self) -> str:
        """The protocols that the rows name, as they print them; "" where they name none."""
        return "; ".join(unique([row.get("protocol") or "" for row in self.rows]))

    @property
    def headline(self) -> str:
        """The form of R by which rows are ranked."""
        return str((self.leaderboard.get("protocol") or {}).get("headline") or "logistic")

    @property
    def backbones(self) -> list[str]:
        """Backbones of the subjects."""
        return unique([self.settings[subject].backbone for subject in self.subjects])

    @property
    def scenarios(self) -> list[str]:
        """Scenarios on the leaderboard, in its order."""
        return unique([row["scenario"] for row in self.rows])


def read(workdir: str | Path, *more: str | Path) -> ReportedRun:
    """Read WORKDIR, and more of them beside it.

    Raises FileNotFoundError without a leaderboard.json and ValueError when it does not hold rows.
    """
    runs = [_read(storage.directory(path)) for path in (workdir, *more)]
    return _merged(runs) if more else runs[0]


def _read(directory: Path) -> ReportedRun:
    workdir = Workdir(directory)
    leaderboard = _leaderboard(workdir.leaderboard())
    gaps: list[str] = []
    manifest = _json(workdir.manifest, gaps) or {}
    found = workdir.complete_cells()
    cells: list[FinishedCell] = []
    tables: dict[str, pa.Table] = {}
    for folder in found:
        if (info := _json(folder.summary, gaps)) is not None:
            cells.append(finished_cell(folder, info))
            if (table := _records(folder, gaps)) is not None:
                tables[folder.name] = table
    for folder in workdir.incomplete_cells():
        gaps.append(f"cells/{folder.name}: not complete (no cell.json), left out. Run the same command again.")
    if not found:
        gaps.append("cells/: no complete cell found; there is no gallery, no judge agreement and no cost to show.")
    names = unique([row["subject"] for row in leaderboard["rows"]] + [cell.subject for cell in cells])
    settings = {name: _setting(name, manifest) for name in names}
    attacked, probed = (_rows_beside(path, gaps) for path in (workdir.attack_scores(), workdir.probe_scores()))
    rows = leaderboard["rows"]
    return ReportedRun(directory, leaderboard, rows, cells, tables, manifest, gaps, settings, {}, attacked, probed)


def _rows_beside(path: Path, gaps: list[str]) -> list[dict[str, Any]]:
    """The rows of a file beside the leaderboard; none where it is missing or cannot be read."""
    found = (_json(path, gaps) if path.exists() else None) or {}
    return found["rows"] if isinstance(found.get("rows"), list) else []


def _setting(subject: str, manifest: dict[str, Any]) -> Setting:
    """The setting of a subject. Parts that the manifest lacks, or has in another form, are left unknown."""
    config = manifest.get("config")
    config = config if isinstance(config, dict) else {}

    def part(section: str, key: str) -> Any:
        values = config.get(section)
        return values.get(key) if isinstance(values, dict) else None

    listed = [s for s in config.get("subjects") or () if isinstance(s, dict) and s.get("name") == subject]
    method = listed[0].get("method", "") if listed and not listed[0].get("checkpoint") else ""
    rank = part("bft", "rank")
    backbone, prompts = config.get("base"), part("prompts", "harmful")
    return Setting(
        subject,
        str(method),
        Path(str(backbone)).name if backbone else "",
        rank if isinstance(rank, int) else None,
        prompts_lib.path_of(str(prompts)).name if prompts else "",
    )


def _merged(runs: list[ReportedRun]) -> ReportedRun:
    """Several runs as one. Every subject is named after itself and the settings in which its run differs."""
    _check_one_protocol(runs)
    labels = _labels(runs)
    rows: list[dict[str, Any]] = []
    cells: list[FinishedCell] = []
    tables: dict[str, pa.Table] = {}
    gaps: list[str] = []
    settings: dict[str, Setting] = {}
    others: dict[str, dict[str, Any]] = {}
    attacked: list[dict[str, Any]] = []
    probed: list[dict[str, Any]] = []
    board: dict[str, Any] = {"comparisons": [], "averages": [], "audit": [], "notes": []}
    for run, varying in zip(runs, labels, strict=True):
        label = " · ".join(text for _, text in varying)

        def named(subject: str, label: str = label) -> str:
            return f"{subject} · {label}"

        rows += [row | {"subject": named(row["subject"])} for row in run.rows]
        attacked += [row | {"subject": named(row["subject"])} for row in run.attacked]
        probed += [row | {"subject": named(row["subject"])} for row in run.probed]
        cells += [c._replace(subject=named(c.subject), name=f"{label}: {c.name}") for c in run.cells]
        tables |= {f"{label}: {name}": table for name, table in run.records.items()}
        gaps += [f"{label}: {gap}" for gap in run.gaps]
        settings |= {named(s): setting._replace(varying=varying) for s, setting in run.settings.items()}
        others[label] = run.manifest
        part = run.leaderboard
        board["notes"] += [f"{label}: {note}" for note in part.get("notes") or ()]
        board["comparisons"] += [c | {"a": named(c["a"]), "b": named(c["b"])} for c in part.get("comparisons") or ()]
        board["averages"] += [a | {"subject": named(a["subject"])} for a in part.get("averages") or ()]
        for entry in part.get("audit") or ():
            by_name = {key: {named(s): v for s, v in entry[key].items()} for key in ("SPQR", "rank")}
            board["audit"].append(entry | by_name)
    bounds = [run.leaderboard.get("fid_bounds") for run in runs]
    if any(pair != bounds[0] for pair in bounds):
        board["notes"].append("Q and SPQR of different runs do not compare: their FID bounds differ; pin them")
    first_board = runs[0].leaderboard
    board |= {key: first_board.get(key) or {} for key in ("bootstrap", "protocol")}
    if all(pair == bounds[0] for pair in bounds):
        board |= {"fid_bounds": bounds[0], "fid_bounds_source": first_board.get("fid_bounds_source")}
    headline = score.column("SPQR", runs[0].headline)
    rows.sort(key=lambda row: (row["scenario"], row["profile"], -(row.get(headline) or 0.0)))
    first = runs[0].manifest
    del others[next(iter(others))]
    board |= {"rows": rows}
    return ReportedRun(runs[0].directory, board, rows, cells, tables, first, gaps, settings, others, attacked, probed)


def _check_one_protocol(runs: list[ReportedRun]) -> None:
    """Raise ValueError for runs of different protocols. They may differ in single fields, such as a rank."""
    listed = protocols.different([(run.directory.name, run.protocol) for run in runs])
    if listed:
        raise ValueError(
            f"runs of different protocols never share a table ({listed}): make one report for each protocol."
        )


def _labels(runs: list[ReportedRun]) -> list[tuple[tuple[str, str], ...]]:
    """For every run the settings in which the runs differ, and the name of its directory where two would be alike."""
    texts = {"backbone": "{}", "rank": "rank {}", "prompts": "{}"}
    firsts = [next(iter(run.settings.values()), Setting("", "", "", None, "")) for run in runs]
    varying = [name for name in texts if len({getattr(setting, name) for setting in firsts}) > 1]
    labels = [tuple((name, texts[name].format(getattr(s, name) or "unknown")) for name in varying) for s in firsts]
    if len(set(labels)) == len(labels):
        return labels
    names = [run.directory.resolve().name for run in runs]
    names = [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names, 1)]
    return [(*label, ("run", name)) for label, name in zip(labels, names, strict=True)]


def key_of(record: dict[str, Any]) -> PairKey:
    """The key of an image, from its record."""
    return PairKey(record["role"], record["prompt_set"], record["prompt_id"], record["k"])


def judge_records(record: dict[str, Any]) -> dict[str, Any]:
    """What each judge answered about one image, by judge. Text that is not JSON is returned as `unreadable`."""
    try:
        judges = json.loads(record["judges"] or "{}")
    except json.JSONDecodeError:
        return {"unreadable": record["judges"]}
    return judges if isinstance(judges, dict) else {"unreadable": judges}


def each_image(run: ReportedRun) -> Iterator[tuple[FinishedCell, dict[str, Any]]]:
    """Every image once, with its cell and record. Images that the cells of a subject share come with the first cell."""
    seen: set[tuple[str, PairKey]] = set()
    for cell in run.cells:
        for record in run.records_of(cell):
            if record["phase"] == "before":
                if (cell.subject, key_of(record)) in seen:
                    continue
                seen.add((cell.subject, key_of(record)))
            yield cell, record


def profile_order(profile: str) -> tuple[int, str]:
    """A sorting key: from the lightest fine-tuning to the heaviest, then those beyond the protocols', then others."""
    return (TRAINED.index(profile) if profile in TRAINED else len(TRAINED), profile)


def shown_profile(profile: str) -> str:
    """A profile as tables and figures name it: one beyond the protocols' is marked as ours."""
    return profile if profile in PROFILES else f"{profile} (ours)"


def headline_profile(run: ReportedRun) -> str | None:
    """The profile of Table 1: `standard` as in the paper, else the heaviest of the protocol's, else the last one."""
    profiles = [profile for profile in run.profiles if profile in PROFILES] or run.profiles
    return "standard" if "standard" in profiles else profiles[-1] if profiles else None


def headline_scenario(run: ReportedRun) -> str:
    """The general scenario, or the first one that ran."""
    return "general" if "general" in run.scenarios or not run.scenarios else run.scenarios[0]


def headline_rows(run: ReportedRun) -> list[dict[str, Any]]:
    """Rows of the headline profile on the headline scenario."""
    headline = headline_profile(run), headline_scenario(run)
    return [row for row in run.rows if (row["profile"], row["scenario"]) == headline]


def unique(values: list[T]) -> list[T]:
    """The distinct values in their order."""
    return list(dict.fromkeys(values))


def _leaderboard(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no leaderboard to report. Run the score stage first (--stages score,report).")
    try:
        leaderboard = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error}). Run the score stage again (--stages score).") from None
    if not isinstance(leaderboard, dict) or not isinstance(leaderboard.get("rows"), list):
        raise ValueError(f"{path}: expected an object with a list 'rows'. Run the score stage again (--stages score).")
    for row in leaderboard["rows"]:
        if absent := [name for name in ("subject", "profile", "scenario") if not isinstance(row.get(name), str)]:
            raise ValueError(f"{path}: a row lacks {absent}. Run the score stage again (--stages score).")
    return leaderboard


def _records(folder: CellFolder, gaps: list[str]) -> pa.Table | None:
    table, problem = records.read_leniently(folder.records, COLUMNS, optional=OPTIONAL)
    if problem:
        gaps.append(f"cells/{folder.name}/{folder.records.name}: {problem}; judge it again.")
        return None
    return table


def _json(path: Path, gaps: list[str]) -> dict[str, Any] | None:
    """The object in a JSON file; None, and a line in `gaps`, for a file that cannot be read."""
    where = f"{path.parent.name}/{path.name}" if path.name == "cell.json" else path.name
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        gaps.append(f"{where}: not found; what it would tell is missing below.")
        return None
    except (OSError, ValueError) as error:
        gaps.append(f"{where}: cannot be read ({type(error).__name__}); what it would tell is missing below.")
        return None
    if not isinstance(value, dict):
        gaps.append(f"{where}: expected a JSON object, found {type(value).__name__}.")
        return None
    return value
