"""Figures for a paper or a slide, each by name, as SVG and PNG files.

2: before and after examples. 3: robustness against prompt adherence. 4: radars of S, P, Q and R by category. drift: h
before and after, and against steps where it was measured along the way. attacks: robustness to fine-tuning against
robustness to attack.

Drawn with matplotlib's object interface (no display, no global state). The palette is Okabe-Ito's, which colour-blind
readers can tell apart; profiles differ in marker shape as well. Files carry no date: the same run gives the same bytes.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from spqr_jax import score
from spqr_jax.report.examples import examples
from spqr_jax.report.reading import ReportedRun, shown_profile, unique
from spqr_jax.report.tabular import figure_of

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D")
AXES = {"S": PALETTE[0], "P": PALETTE[1], "Q": PALETTE[2], "R": PALETTE[3]}
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "spqr",
    "svg.fonttype": "path",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def write(run: ReportedRun, directory: Path, names: Sequence[str] | None = None, *, blur: bool = True) -> list[Path]:
    """Write figures as SVG and PNG and return the files. A figure whose data is missing is left out.

    names: some of FIGURES; None writes all. blur: whether images of harmful prompts are blurred in the examples.
    Raises ValueError for a name that is not known.
    """
    chosen = known(FIGURES if names is None else names)
    directory.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    with matplotlib.rc_context(STYLE):
        for name, figure in (pair for key in chosen for pair in FIGURES[key](run, blur)):
            for suffix, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
                path = directory / f"{name}.{suffix}"
                figure.savefig(path, dpi=150, bbox_inches="tight", facecolor="white", metadata=metadata)
                paths.append(path)
    return paths


def known(names: Iterable[str | int]) -> list[str]:
    """The names as text, in the spelling of FIGURES. Raises ValueError for a name that is not known."""
    wanted = [str(name) for name in names]
    if unknown := [name for name in wanted if name not in FIGURES]:
        raise ValueError(f"report.figures: unknown {unknown}, expected some of {list(FIGURES)}.")
    return wanted


def _figure_2(run: ReportedRun, blur: bool) -> Iterable[tuple[str, Figure]]:
    figure = examples(run, blur=blur)
    if figure is not None:
        yield "before_after_examples", figure


def _figure_3(run: ReportedRun, blur: bool) -> Iterable[tuple[str, Figure]]:
    for suffix, rows in _by_scenario(run):
        if any(_measured(row, "P", "R") for row in rows):
            yield f"adherence_robustness{suffix}", adherence_robustness(run, rows, "logistic")
            yield f"adherence_robustness_exponential{suffix}", adherence_robustness(run, rows, "exponential")


def _figure_4(run: ReportedRun, blur: bool) -> Iterable[tuple[str, Figure]]:
    names = dict(zip(run.subjects, unique_slugs(run.subjects), strict=True))
    for subject in run.subjects:
        rows = [row for row in run.rows if row["subject"] == subject and len(row.get("categories") or {}) >= 3]
        if rows:
            yield f"radar_{names[subject]}", radars(subject, rows)


def _figure_drift(run: ReportedRun, blur: bool) -> Iterable[tuple[str, Figure]]:
    for suffix, rows in _by_scenario(run):
        if any(_measured(row, "h_before", "h_after") for row in rows):
            yield f"drift{suffix}", harm_before_and_after(rows)
        if curves := [row for row in rows if row.get("drift_curve")]:
            yield f"drift_curve{suffix}", harm_during(run, curves)


def _figure_attacks(run: ReportedRun, blur: bool) -> Iterable[tuple[str, Figure]]:
    for suffix, rows in _by_scenario(run):
        scenarios = {row["scenario"] for row in rows}
        attacked = [row for row in run.attacked if row["scenario"] in scenarios]
        if any(_measured(row, "asr_before", "asr_after") for row in attacked):
            yield f"attack_robustness{suffix}", attack_robustness(run, attacked)


FIGURES: dict[str, Callable[[ReportedRun, bool], Iterable[tuple[str, Figure]]]] = {
    **{"2": _figure_2, "3": _figure_3, "4": _figure_4},
    "drift": _figure_drift,
    "attacks": _figure_attacks,
}


def _by_scenario(run: ReportedRun) -> Iterable[tuple[str, list[dict[str, Any]]]]:
    """End of the file name (empty for one scenario alone) and rows."""
    for scenario, name in zip(run.scenarios, unique_slugs(run.scenarios), strict=True):
        rows = [row for row in run.rows if row["scenario"] == scenario]
        yield "" if len(run.scenarios) == 1 else f"_{name}", rows


def adherence_robustness(run: ReportedRun, rows: list[dict[str, Any]], form: str) -> Figure:
    """Figure 3 of the paper, with intervals: R in one form against P; colour is the method, shape the profile."""
    key = score.column("R", form)
    figure = Figure(figsize=(7, 4.6))
    axes = figure.add_subplot()
    for row in rows:
        if not _measured(row, "P", key):
            continue
        colour = PALETTE[run.subjects.index(row["subject"]) % len(PALETTE)]
        shape = MARKERS[run.profiles.index(row["profile"]) % len(MARKERS)]
        x, y = row["P"], row[key]
        look: dict[str, Any] = {
            "color": colour,
            "marker": shape,
            "markersize": 8,
            "elinewidth": 1.2,
            "capsize": 2.5,
            "alpha": 0.9,
        }
        axes.errorbar(x, y, xerr=_errors(row, "P"), yerr=_errors(row, key), **look)
    axes.set(xlabel="Prompt adherence P (mean CLIP cosine)", ylabel=f"Robustness R ({form})", ylim=(-0.03, 1.03))
    axes.set_title(plain(rows[0]["scenario"]), loc="left", fontsize=12)
    _methods_and_profiles(run, axes)
    return figure


def _methods_and_profiles(run: ReportedRun, axes: Any) -> None:
    """The legend: colour is the method, shape the profile."""
    subjects = [(plain(s), PALETTE[i % len(PALETTE)], "o") for i, s in enumerate(run.subjects)]
    profiles = [(plain(shown_profile(p)), "#777777", MARKERS[i % len(MARKERS)]) for i, p in enumerate(run.profiles)]
    marks = [Line2D([], [], color=c, marker=m, linestyle="", label=label) for label, c, m in subjects + profiles]
    axes.legend(handles=marks, loc="center left", bbox_to_anchor=(1.01, 0.5))


def attack_robustness(run: ReportedRun, rows: list[dict[str, Any]]) -> Figure:
    """Robustness to fine-tuning against robustness to attack, both as the percentage of prompts that held.

    Across: prompts that held before fine-tuning under the worst that attacks did. Up: prompts that held after it,
    without any attack (filled) and under attack (hollow, a little to the right).
    """
    figure = Figure(figsize=(7, 4.6))
    axes = figure.add_subplot()
    for subject, profile in unique([(row["subject"], row["profile"]) for row in rows]):
        own = [row for row in rows if (row["subject"], row["profile"]) == (subject, profile)]
        alone, attacked = own[0], own[-1]  # no attack comes first, and the worst last
        look: dict[str, Any] = {
            "color": PALETTE[run.subjects.index(subject) % len(PALETTE)],
            "marker": MARKERS[run.profiles.index(profile) % len(MARKERS)],
            "markersize": 8,
            "elinewidth": 1.2,
            "capsize": 2.5,
        }
        if not _measured(attacked, "asr_before"):
            continue
        x, xerr = 100 - attacked["asr_before"], _held_errors(attacked, "asr_before")
        for row, shift, face in ((alone, 0, look["color"]), (attacked, 1.5, "white")):
            if _measured(row, "asr_after"):
                y, yerr = 100 - row["asr_after"], _held_errors(row, "asr_after")
                axes.errorbar(x + shift, y, xerr=None if shift else xerr, yerr=yerr, mfc=face, **look)
    axes.set(xlabel=plain(f"Prompts that held before fine-tuning, {rows[-1]['attack']} (%)"), xlim=(-4, 104))
    axes.set(ylabel="Prompts that held after fine-tuning (%)\nfilled: no attack, hollow: attacked", ylim=(-4, 104))
    axes.set_title(plain(rows[0]["scenario"]), loc="left", fontsize=12)
    _methods_and_profiles(run, axes)
    return figure


def _held_errors(row: dict[str, Any], key: str) -> list[list[float]] | None:
    """The errors of a share's complement: those of the share, with its ends exchanged."""
    errors = _errors(row, key)
    return None if errors is None else errors[::-1]


def harm_before_and_after(rows: list[dict[str, Any]]) -> Figure:
    """Harmful share before and after benign fine-tuning, one pair of bars per method and profile."""
    rows = [row for row in rows if _measured(row, "h_before", "h_after")]
    figure = Figure(figsize=(7, 0.45 * len(rows) + 1.4))
    axes = figure.add_subplot()
    for offset, key, colour in ((-0.19, "h_before", PALETTE[5]), (0.19, "h_after", PALETTE[3])):
        label = "before fine-tuning" if key == "h_before" else "after fine-tuning"
        places = [i + offset for i in range(len(rows))]
        axes.barh(places, [row[key] for row in rows], height=0.36, color=colour, label=label)
        for place, row in zip(places, rows, strict=True):
            if (error := _errors(row, key)) is not None:
                axes.errorbar(row[key], place, xerr=error, color="#333333", elinewidth=1.1, capsize=2.5)
    axes.set_yticks(range(len(rows)), [plain(f"{row['subject']} · {row['profile']}") for row in rows])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(left=0)
    axes.set_xlabel("Images of harmful prompts judged unsafe, h (%)")
    axes.set_title(plain(rows[0]["scenario"]), loc="left", fontsize=12)
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
    return figure


def harm_during(run: ReportedRun, rows: list[dict[str, Any]]) -> Figure:
    """Harmful share against fine-tuning steps, with intervals; a panel per profile, the unaligned control dashed."""
    profiles = [p for p in run.profiles if any(row["profile"] == p for row in rows)]
    figure = Figure(figsize=(4.6 * len(profiles), 3.8))
    panels = figure.subplots(1, len(profiles), squeeze=False, sharey=True)[0]
    for axes, profile in zip(panels, profiles, strict=True):
        for row in (row for row in rows if row["profile"] == profile):
            curve, i = row["drift_curve"], run.subjects.index(row["subject"])
            colour, shape = PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]
            low, high = zip(*curve["h_ci"], strict=True)
            axes.fill_between(curve["steps"], low, high, color=colour, alpha=0.15, linewidth=0)
            axes.plot(curve["steps"], curve["h"], color=colour, marker=shape, label=plain(row["subject"]))
            if curve["reached"]:  # where the half-life lies on the curve
                half = (curve["h"][0] + curve["control_h"]) / 2
                axes.plot([curve["half_life"]], [half], marker="*", markersize=13, color=colour, mec="white")
        for control in unique([row["drift_curve"]["control_h"] for row in rows if row["profile"] == profile]):
            if control is not None:
                axes.axhline(control, color="#555555", linestyle="--", linewidth=1, label="unaligned, before")
        axes.set(xlabel="Fine-tuning steps", ylim=(0, 102))
        axes.set_title(plain(f"{profile} · {rows[0]['scenario']}"), loc="left", fontsize=12)
    panels[0].set_ylabel("Judged unsafe, h (%)")
    panels[-1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), title="star: half of the gain lost")
    return figure


def radars(subject: str, rows: list[dict[str, Any]]) -> Figure:
    """Figure 4 of the paper: S, P, Q and R (logistic) by category of harm, one radar per row of the leaderboard.

    P and Q come from benign prompts, which have no category of harm: unless a category brings its own, they are drawn
    dashed, as rings at the method's overall value.
    """
    across, labels = min(len(rows), 3), {"S": "S", "P": "P", "Q": "Q", "R": "R (logistic)"}
    figure = Figure(figsize=(4.3 * across, 4.4 * math.ceil(len(rows) / across)))
    for i, row in enumerate(rows):
        axes = figure.add_subplot(math.ceil(len(rows) / across), across, i + 1, projection="polar")
        names = list(row["categories"])
        angles = [2 * math.pi * k / len(names) for k in range(len(names))]
        for axis, colour in AXES.items():
            own = [row["categories"][name].get(axis) for name in names]
            shared = axis in "PQ" and all(value is None for value in own)
            values = [row.get(axis)] * len(names) if shared else own
            points = [(a, v) for a, v in zip(angles, values, strict=True) if v is not None]
            if points:
                closed = [*points, points[0]]
                axes.plot(
                    *zip(*closed, strict=True), color=colour, linestyle="--" if shared else "-", label=labels[axis]
                )
        axes.set(ylim=(0, 1), theta_offset=math.pi / 2, theta_direction=-1, yticks=[0.25, 0.5, 0.75, 1.0])
        axes.set_xticks(angles, [plain(name) for name in names], fontsize=9)
        axes.tick_params(axis="x", pad=10)
        axes.set_yticklabels(["", "0.5", "", "1"], fontsize=8, color="#777777")
        axes.set_title(plain(f"{subject}: {row['profile']}, {row['scenario']}"), fontsize=11, pad=18)
        axes.legend(loc="lower left", bbox_to_anchor=(-0.18, -0.12), fontsize=9)
    figure.tight_layout()
    return figure


def slug(name: str) -> str:
    """A safe piece of a file name: letters, digits, dot, dash and underscore, not starting with a dot."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:60] or "unnamed"


def unique_slugs(names: list[str]) -> list[str]:
    """Slugs in order, numbered where two names give the same."""
    slugs: list[str] = []
    for name in names:
        base = slug(name)
        free = (base if i == 1 else f"{base}-{i}" for i in range(1, len(names) + 1))
        slugs.append(next(candidate for candidate in free if candidate not in slugs))
    return slugs


def plain(text: str) -> str:
    """The text with dollar signs escaped, since matplotlib would take them for the start of a formula."""
    return text.replace("$", r"\$")


def _measured(row: dict[str, Any], *keys: str) -> bool:
    return all(figure_of(row, key).value is not None for key in keys)


def _errors(row: dict[str, Any], key: str) -> list[list[float]] | None:
    """Distances from the figure to the ends of its interval, as matplotlib wants them; never negative."""
    found = figure_of(row, key)
    if found.value is None or found.low is None or found.high is None:
        return None
    return [[max(found.value - found.low, 0.0)], [max(found.high - found.value, 0.0)]]
