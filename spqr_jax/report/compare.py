"""Two runs side by side, and which of their differences are real: paired tests over the prompts that both share.

The rows (subject, profile, scenario) that both runs have are compared. h, drift and CLIP similarity are means over
prompts and are tested. R and SPQR follow from these, and FID from whole sets of images: they are only set side by side.
The test over prompts is about the models at hand. Where a run has several fine-tuning seeds of a row, a figure after
fine-tuning has to pass a second test too, which holds the variation between seeds; intervals then hold it as well.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spqr_jax import protocols
from spqr_jax.files import storage
from spqr_jax.files.layout import Workdir
from spqr_jax.report.tabular import Figure, Table, figure_of, markdown
from spqr_jax.score import seeds, stats
from spqr_jax.score.cells import PHASES, ROLES, Array, FinishedCell, Images, PromptKey, complete_cells, read_images
from spqr_jax.score.seeds import SeedSpread
from spqr_jax.score.stats import Draws

REPLICATES, SEED = 2000, 0
UNTESTED = ("S", "P", "Q", "R", "R_exponential", "SPQR", "SPQR_exponential", "fid_before", "fid_after")
RowKey = tuple[str, str, str]  # subject, profile, scenario
Pair = tuple[list[stats.Totals], list[stats.Totals]]  # of run A and of run B, by seed, over the same prompts


class Difference(NamedTuple):
    """The difference of one tested figure, run B minus run A, over the prompts that both share.

    In percentage points for h and drift, and in units of the cosine for CLIP similarity.
    """

    row: RowKey  # profile and scenario are "" before fine-tuning
    figure: str
    a: float
    b: float
    interval: stats.Interval
    n: int  # prompts that both share and decided
    p: float  # sign-flip test; with several seeds the larger p value of it and of `seeds.difference_test`
    p_holm: float  # corrected over all tests of the comparison


class Comparison(NamedTuple):
    """Two runs compared: the tested differences, and the rows of both leaderboards side by side."""

    names: tuple[str, str]
    differences: list[Difference]
    rows: list[tuple[RowKey, dict[str, Any], dict[str, Any]]]  # the leaderboards' rows in A and B
    notes: list[str]


class _Tested(NamedTuple):
    row: RowKey
    figure: str
    a: Array  # [n] per prompt
    b: Array
    interval: stats.Interval
    seeds: tuple[SeedSpread | None, SeedSpread | None]  # of A and B; None before fine-tuning and for one seed

    @property
    def p(self) -> float:
        over_prompts = float(stats.sign_flip_test(self.b - self.a)[0])
        if self.seeds == (None, None):
            return over_prompts
        return max(over_prompts, seeds.difference_test(self.b - self.a, self.seeds))


def compare_runs(a: str | Path, b: str | Path, *, replicates: int = REPLICATES, seed: int = SEED) -> Comparison:
    """Compare two work directories with records and leaderboard.json.

    Raises FileNotFoundError for a directory without complete cells or leaderboard, and ValueError where the runs share
    no row.
    """
    directories = (storage.directory(a), storage.directory(b))
    cells = [_cells(directory) for directory in directories]
    boards = [_rows(directory) for directory in directories]
    _check_one_protocol(directories, boards)
    shared = [row for row in cells[0] if row in cells[1]]
    if not shared:
        raise ValueError(f"{a} and {b} have no subject, profile and scenario in common; there is nothing to compare.")
    notes = _notes(directories, cells, shared)
    tested: list[_Tested] = []
    for row in shared:
        first = not any(other[0] == row[0] for other in shared[: shared.index(row)])
        a_cells, b_cells = ([read_images(cell) for cell in found[row]] for found in cells)
        tested += _row_tests(row, a_cells, b_cells, first, notes, Draws(replicates, seed))
    p = [t.p for t in tested]
    differences = [
        Difference(t.row, t.figure, float(t.a.mean()), float(t.b.mean()), t.interval, len(t.a), one, adjusted)
        for t, one, adjusted in zip(tested, p, stats.holm(p).tolist(), strict=True)
    ]
    names = tuple(directory.resolve().name for directory in directories)
    names = names if names[0] != names[1] else ("A", "B")
    rows = [(row, boards[0][row], boards[1][row]) for row in shared if row in boards[0] and row in boards[1]]
    return Comparison((names[0], names[1]), differences, rows, notes)


def _check_one_protocol(directories: tuple[Path, Path], boards: list[dict[RowKey, dict[str, Any]]]) -> None:
    """Raise ValueError for runs of different protocols. They may differ in single fields, such as a rank."""
    stated = [next((row.get("protocol") or "" for row in board.values()), "") for board in boards]
    if listed := protocols.different(zip(map(str, directories), stated, strict=True)):
        raise ValueError(f"runs of different protocols do not compare ({listed}).")


def text(comparison: Comparison, *, level: float = 0.05) -> str:
    """The comparison as Markdown: which differences are real at this level, then all figures of both runs."""
    real = [d for d in comparison.differences if d.p_holm < level]
    a, b = comparison.names
    total = len(comparison.differences)
    lines = [f"# {a} and {b}", "", f"{len(real)} of {total} tested differences are real (Holm, level {level:g})."]
    lines += [f"- {d.row[0]}{_where(d.row)}: {d.figure} {_value(d, d.b - d.a, True)}" for d in real]
    lines += ["", *(f"- note: {note}" for note in comparison.notes), ""]
    return "\n".join([*lines, *(markdown(table) for table in tables(comparison, level=level))])


def tables(comparison: Comparison, *, level: float = 0.05) -> list[Table]:
    """The tested differences, and the figures that are not tested, side by side."""
    a, b = comparison.names
    tested: list[list[str | Figure]] = [
        [
            *d.row,
            d.figure,
            _value(d, d.a),
            _value(d, d.b),
            Figure(d.b - d.a, *d.interval, digits=_digits(d.figure), signed=True),
            str(d.n),
            "<0.001" if d.p_holm < 0.001 else f"{d.p_holm:.3f}",
            "real" if d.p_holm < level else "not established",
        ]
        for d in comparison.differences
    ]
    columns = ["Subject", "Profile", "Scenario", "Figure", a, b, f"{b} minus {a}", "prompts", "p (Holm)", "difference"]
    beside: list[list[str | Figure]] = [
        [*row, key, figure_of(in_a, key, digits=_digits(key)), figure_of(in_b, key, digits=_digits(key))]
        for row, in_a, in_b in comparison.rows
        for key in UNTESTED
    ]
    labels = dict.fromkeys(row.get("protocol") or "not stated" for pair in comparison.rows for row in pair[1:])
    stated = f"Protocol: {'; '.join(labels)}."
    return [
        Table("compare", f"Paired over the prompts that both runs share. {stated}", columns, tested),
        Table(
            "beside",
            f"Not tested: figures that follow from the above or from whole sets. {stated}",
            columns[:6],
            beside,
        ),
    ]


def _row_tests(
    row: RowKey, a: list[dict[str, Images]], b: list[dict[str, Images]], first: bool, notes: list[str], draws: Draws
) -> list[_Tested]:
    """The tests of one row. Figures before fine-tuning belong to the subject: its first row tests them."""
    subject: RowKey = (row[0], "", "")
    tests: list[_Tested | None] = []
    shared = {role: _shared_prompts(a, b, role) for role in ROLES}
    if len(shared["harmful"]) > 1:
        h = {phase: _both(a, b, "harmful", shared["harmful"], "unsafe", phase) for phase in PHASES}
        if first:
            tests.append(_share(subject, "h before", h["before"], draws))
        tests.append(_share(row, "h after", h["after"], draws))
        tests.append(_drift(row, h, draws))
    if len(shared["benign"]) > 1:
        for phase in PHASES if first else PHASES[1:]:
            clip = _both(a, b, "benign", shared["benign"], "clip", phase)
            tests.append(_mean(subject if phase == "before" else row, f"CLIP {phase}", clip, draws))
    for role, prompts in shared.items():
        counts = [len(cells[0][role].prompts) for cells in (a, b)]
        if counts != [len(prompts)] * 2:
            in_both = f"{len(prompts)} {role} prompts are in both, of {counts[0]} and {counts[1]}"
            notes.append(f"{row[0]}{_where(row)}: {in_both}")
    return [test for test in tests if test is not None]


def _share(row: RowKey, name: str, pair: Pair, draws: Draws) -> _Tested | None:
    """Difference of two shares, in points, with the pseudo-prompts of `stats.paired_shares`."""
    one, two = (stats.pooled(by_seed) for by_seed in pair)
    drawn = stats.paired_shares(one, two, replicates=draws.replicates, seed=draws.seed)
    return _tested(
        row, name, (100.0 * _ratio(one), 100.0 * _ratio(two)), drawn.after - drawn.before, pair, draws, 100.0
    )


def _drift(row: RowKey, h: dict[str, Pair], draws: Draws) -> _Tested | None:
    one, two = ((stats.pooled(h["before"][run]), stats.pooled(h["after"][run])) for run in (0, 1))
    drawn = stats.drift_difference(one, two, replicates=draws.replicates, seed=draws.seed)
    a, b = (100.0 * (_ratio(after) - _ratio(before)) for before, after in (one, two))
    return _tested(row, "drift", (a, b), drawn, h["after"], draws, 100.0)


def _mean(row: RowKey, name: str, pair: Pair, draws: Draws) -> _Tested | None:
    one, two = (stats.pooled(by_seed) for by_seed in pair)
    weights = stats.resample_weights(len(one.sums), draws.replicates, seed=draws.seed)
    drawn = stats.mean_replicates(weights, two) - stats.mean_replicates(weights, one)
    return _tested(row, name, (_ratio(one), _ratio(two)), drawn, pair, draws, 1.0)


def _tested(
    row: RowKey, name: str, per_prompt: tuple[Array, Array], drawn: Array, by_seed: Pair, draws: Draws, unit: float
) -> _Tested | None:
    """None where too few prompts have a value in both runs.

    per_prompt: in the figure's unit. drawn [B] and by_seed, the totals that differ between seeds: times `unit`.
    """
    a, b = _decided(*per_prompt)
    if len(a) < 2 or not np.all(np.isfinite(drawn)):
        return None
    after = bool(row[1])  # before fine-tuning all seeds have the same images
    spread = [seeds.spread(totals) if after else None for totals in by_seed]
    scaled = [s and SeedSpread(unit * s.values, unit**2 * s.noise) for s in spread]
    moved = [seeds.deviations(s, draws, f"{run}: {' / '.join(row)}") for run, s in zip("AB", scaled, strict=True)]
    drawn = unit * drawn - (0.0 if moved[0] is None else moved[0]) + (0.0 if moved[1] is None else moved[1])
    interval = stats.percentile_interval(drawn, float(np.mean(b - a)))
    return _Tested(row, name, a, b, interval, (scaled[0], scaled[1]))


def _ratio(totals: stats.Totals) -> Array:
    with np.errstate(invalid="ignore"):
        return totals.sums / totals.counts


def _decided(a: Array, b: Array) -> tuple[Array, Array]:
    known = np.isfinite(a) & np.isfinite(b)
    return a[known], b[known]


def _shared_prompts(a: list[dict[str, Images]], b: list[dict[str, Images]], role: str) -> list[PromptKey]:
    """Prompts of the same set, id and text."""
    other = b[0][role].prompts
    return [prompt for prompt, words in a[0][role].prompts.items() if other.get(prompt) == words]


def _both(
    a: list[dict[str, Images]], b: list[dict[str, Images]], role: str, prompts: list[PromptKey], field: str, phase: str
) -> Pair:
    one, two = ([_totals(cell[role], prompts, field, phase) for cell in cells] for cells in (a, b))
    return one, two


def _totals(images: Images, prompts: list[PromptKey], field: str, phase: str) -> stats.Totals:
    """Sums and counts per shared prompt, over the images of one seed, of `Images.unsafe` or `.clip`."""
    place = {prompt: i for i, prompt in enumerate(prompts)}
    values = zip(images.keys, getattr(images, field)[phase], strict=True)
    used = [(place[key[:2]], value) for key, value in values if key[:2] in place]
    return stats.totals([i for i, _ in used], [value for _, value in used], len(prompts))


def _cells(directory: Path) -> dict[RowKey, list[FinishedCell]]:
    found = {}
    for cells in complete_cells(directory):
        found[cells[0].subject, cells[0].profile, cells[0].scenario] = cells
    return found


def _rows(directory: Path) -> dict[RowKey, dict[str, Any]]:
    path = Workdir(directory).leaderboard()
    if not path.exists():
        raise FileNotFoundError(f"{path}: no leaderboard. Run the score stage first (--stages score).")
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return {(row["subject"], row["profile"], row["scenario"]): row for row in rows}


def _notes(
    directories: tuple[Path, Path], cells: list[dict[RowKey, list[FinishedCell]]], shared: list[RowKey]
) -> list[str]:
    """What a reader must know before believing a difference: other judges, other settings, rows of one run only."""
    notes = []
    judges = [found[shared[0]][0].judges for found in cells]
    if judges[0] != judges[1]:
        notes.append("the runs have different judges: a difference may be theirs and not the models'")
    configs = [_config(directory) for directory in directories]
    for name in sorted(configs[0].keys() | configs[1].keys()):
        one, two = configs[0].get(name), configs[1].get(name)
        if one != two:
            notes.append(f"config.{name}: {one!r} and {two!r}")
    alone = [row for found, other in (cells, cells[::-1]) for row in found if row not in other]
    if alone:
        notes.append(f"{len(alone)} rows are in one run only, the first: {' / '.join(alone[0])}")
    return notes


def _config(directory: Path) -> dict[str, Any]:
    """The manifest's config with dotted names."""
    path = Workdir(directory).manifest
    config = json.loads(path.read_text(encoding="utf-8")).get("config", {}) if path.exists() else {}

    def flat(value: Any, name: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            return {name: value}
        return {k: v for key, part in value.items() for k, v in flat(part, f"{name}.{key}" if name else key).items()}

    return flat(config, "")


def _where(row: RowKey) -> str:
    return "".join(f" / {part}" for part in row[1:] if part)


def _digits(name: str) -> int:
    return 4 if name.startswith("CLIP") else 1 if name in ("h before", "h after", "drift") else 3


def _value(difference: Difference, value: float, signed: bool = False) -> str:
    return f"{value:{'+' if signed else ''}.{_digits(difference.figure)}f}"
