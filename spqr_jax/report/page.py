"""The contents of the page: the leaderboard, the charts of each method, the judges, the cost."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from markupsafe import Markup

from spqr_jax.report import agreement, outcome, svg
from spqr_jax.report.agreement import Agreement
from spqr_jax.report.facts import Cost, cost, counts, judge_identities
from spqr_jax.report.further_tables import half_life
from spqr_jax.report.reading import ReportedRun, shown_profile, unique
from spqr_jax.report.tabular import FORMS, Figure, Table, figure_of

RADAR_COLOURS = {"S": "c0", "P": "c1", "Q": "c2", "R": "c3"}
PROFILE_COLOURS = ("c5", "c4", "c3", "c2")


class Column(NamedTuple):
    """A column of the leaderboard. Without a domain the bars of its figures range over all rows."""

    key: str
    label: str
    digits: int
    domain: tuple[float, float] | None
    meaning: str

    @property
    def forms(self) -> tuple[str, ...]:
        """R and SPQR exist in two forms, the others in one."""
        return FORMS if self.key in ("R", "SPQR") else ("logistic",)


COLUMNS = (
    Column("SPQR", "SPQR", 3, (0, 1), "harmonic mean of S, P, Q and R; higher is better"),
    Column("S", "S", 3, (0, 1), "safety, 1 - h/100 before fine-tuning; higher is better"),
    Column("P", "P", 3, None, "prompt adherence, mean CLIP cosine before fine-tuning, or its share of the ceiling"),
    Column("Q", "Q", 3, (0, 1), "quality, FID before fine-tuning scaled over the compared methods; higher is better"),
    Column("R", "R", 3, (0, 1), "robustness to benign fine-tuning; higher is better"),
    Column("kept", "kept", 3, (0, 1), "share of the safety gained over the control that fine-tuning leaves"),
    Column("h_before", "h before, %", 1, (0, 100), "share of harmful prompts' images judged unsafe; lower is better"),
    Column("h_after", "h after, %", 1, (0, 100), "the same after fine-tuning; lower is better"),
    Column("dh", "Δh, points", 1, None, "drift: h after minus h before, paired; lower is better"),
    Column("control_h_after", "control's h after, %", 1, (0, 100), "h after of the unaligned control"),
    Column("clip_before", "CLIP before", 3, None, "mean CLIP cosine on benign prompts; higher is better"),
    Column("clip_after", "CLIP after", 3, None, "the same after fine-tuning; if low, h is low because little is drawn"),
    Column("fid_before", "FID before", 1, None, "Fréchet distance to the reference pictures; lower is better"),
    Column("fid_after", "FID after", 1, None, "the same after fine-tuning"),
)


class Shown(NamedTuple):
    """One figure as the leaderboard shows it."""

    form: str
    value: float | None
    text: str
    interval: str
    bar: Markup


class Entry(NamedTuple):
    """One line of the leaderboard: a whole row, or its part for one category, prompt set or language."""

    row: dict[str, Any]
    slice: str  # "category: nudity" and so on, "" for a whole row
    figures: list[list[Shown]]  # by column, then by form


class Curve(NamedTuple):
    """A drift curve: its chart and the half-life of the safety gain as text."""

    chart: Markup
    half_life: str
    n: int


class Card(NamedTuple):
    """A row of the leaderboard on its method's page."""

    row: dict[str, Any]
    categories: list[tuple[str, Any, list[list[Shown]]]]  # name, number of images, figures of CATEGORY_COLUMNS
    radars: list[tuple[str, Markup]]  # form, chart
    shared: list[str]  # axes drawn as rings, because they have no categories
    judges: list[tuple[str, list[list[Shown]]]]
    curve: Curve | None
    variance: list[tuple[str, str]]  # share of the drift's variance from prompts, image noise and seeds


class Method(NamedTuple):
    """The section of one method."""

    subject: str
    colour: str
    is_control: bool
    profiles: list[tuple[str, str, Markup]]  # scenario, form, overall radar
    drift: Markup | None
    cards: list[Card]
    agreement: list[Agreement]


class Page(NamedTuple):
    """All that the templates show."""

    run: ReportedRun
    outcome: str  # one paragraph, "" where there is no method
    counts: dict[str, Any]
    columns: tuple[Column, ...]
    category_columns: tuple[Column, ...]
    entries: list[Entry]
    comparisons: list[dict[str, Any]]
    tables: list[Table]
    slices: list[str]
    scatter: list[tuple[str, Markup]]
    legend: list[tuple[str, str, Markup]]
    radar_legend: list[tuple[str, Markup]]
    profile_legend: list[tuple[str, Markup]]
    methods: list[Method]
    judges: dict[str, list[dict[str, Any]]]
    measured: dict[str, Any]
    cost: Cost
    other: dict[str, Any]


SLICES = {"category": "categories", "prompt set": "prompt_sets", "language": "languages"}
CATEGORY_COLUMNS = tuple(c for c in COLUMNS if c.key in ("S", "h_before", "h_after", "dh", "R"))
MANIFEST_SECTIONS = ("config", "protocol", "versions", "devices", "command", "sha256", "judges", "mini")


def build(run: ReportedRun, tables: list[Table]) -> Page:
    """The contents of the page about a run. `tables` are shown as they are written to files."""
    slices = unique([name for row in run.rows for name, _ in _slices(row) if name])
    domains = {column.key: column.domain or _domain(run, column.key) for column in COLUMNS}
    entries = [
        Entry(part, name, [_shown(part, column, domains) for column in COLUMNS])
        for row in run.rows
        for name, part in _slices(row)
    ]
    agreements = agreement.by_subject(run)
    return Page(
        run=run,
        outcome=outcome.paragraph(run),
        counts=counts(run),
        columns=COLUMNS,
        category_columns=CATEGORY_COLUMNS,
        entries=entries,
        comparisons=[_comparison(pair) for pair in run.leaderboard.get("comparisons") or []],
        tables=tables,
        slices=slices,
        scatter=[(form, chart) for form in FORMS if (chart := _scatter(run, form)) is not None],
        legend=_legend(run),
        radar_legend=[(axis, svg.legend_mark(colour)) for axis, colour in RADAR_COLOURS.items()],
        profile_legend=[
            (shown_profile(p), svg.legend_mark(PROFILE_COLOURS[i % 4])) for i, p in enumerate(run.profiles)
        ],
        methods=[_method(run, subject, domains, agreements.get(subject, [])) for subject in run.subjects],
        judges=judge_identities(run),
        measured=run.manifest.get("mini") or {},
        cost=cost(run),
        other={key: value for key, value in run.manifest.items() if key not in MANIFEST_SECTIONS},
    )


def _slices(row: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The whole row, then the row's figures by category, prompt set and language."""
    yield "", row
    names: dict[str, Any] = {
        key: row[key] for key in ("subject", "profile", "scenario", "is_control", "seeds") if key in row
    }
    for kind, group in SLICES.items():
        parts = row.get(group) or {}
        for name, part in parts.items() if len(parts) > 1 else ():  # a single part is the whole row again
            yield f"{kind}: {name}", {**names, **part, "n_harmful": part.get("n")}


def _domain(run: ReportedRun, key: str) -> tuple[float, float]:
    """The range of a column's bars: from zero to the largest end of an interval; symmetric where values go below."""
    shown = [figure_of(part, key) for row in run.rows for _, part in _slices(row)]
    ends = [abs(end) for f in shown for end in f[:3] if end is not None]
    top = max(ends, default=1.0) or 1.0
    return (-top, top) if key == "dh" else (0.0, top)


def _shown(row: dict[str, Any], column: Column, domains: dict[str, tuple[float, float]]) -> list[Shown]:
    return [
        _show(figure_of(row, column.key, form=form, digits=column.digits), form, domains[column.key])
        for form in column.forms
    ]


def _show(found: Figure, form: str, domain: tuple[float, float]) -> Shown:
    shown = _estimate(found)
    if shown is None:
        return Shown(form, None, found.text(None), "", Markup(""))
    ends = "" if found.low is None else f"[{found.text(found.low)}, {found.text(found.high)}]"
    return Shown(form, found.value, found.text(found.value), ends, svg.interval_bar(shown, domain))


def _comparison(pair: dict[str, Any]) -> dict[str, Any]:
    """The difference of two methods, a minus b, with its figures."""
    signed = {
        key: figure_of(pair, key, digits=3 if key == "SPQR" else 1)._replace(signed=True) for key in ("dh", "SPQR")
    }
    return pair | signed | {"p": figure_of(pair, "dh_p_holm").text(pair.get("dh_p_holm"))}


def _estimate(found: Figure) -> svg.Estimate | None:
    return None if found.value is None else svg.Estimate(found.value, found.low, found.high)


def _scatter(run: ReportedRun, form: str) -> Markup | None:
    """Figure 3 of the paper: robustness against prompt adherence."""
    points = []
    for row in run.rows:
        x, y = _estimate(figure_of(row, "P")), _estimate(figure_of(row, "R", form=form))
        if x is None or y is None:
            continue
        label = f"{row['subject']}, {row['profile']}, {row['scenario']}"
        colour, shape = _colour(run, row["subject"]), _shape(run, row["profile"])
        points.append(svg.Point(label, x, y, colour, shape, _filters(run, row)))
    if not points:
        return None
    title = f"Robustness ({form}) against prompt adherence"
    return svg.scatter(points, x_label="Prompt adherence P", y_label=f"Robustness R ({form})", title=title)


def _legend(run: ReportedRun) -> list[tuple[str, str, Markup]]:
    """Kind, name and mark: colour tells the method, shape the profile."""
    methods = [("method", s, svg.legend_mark(_colour(run, s), "circle")) for s in run.subjects]
    return methods + [("profile", shown_profile(p), svg.legend_mark("ink", _shape(run, p))) for p in run.profiles]


def _colour(run: ReportedRun, subject: str) -> str:
    return f"c{run.subjects.index(subject) % svg.COLOURS}"


def _shape(run: ReportedRun, profile: str) -> str:
    return svg.SHAPES[run.profiles.index(profile) % len(svg.SHAPES)]


def _filters(run: ReportedRun, row: dict[str, Any]) -> dict[str, str]:
    backbone = run.settings[row["subject"]].backbone
    return {"data_profile": row["profile"], "data_scenario": row["scenario"], "data_backbone": backbone}


def _method(run: ReportedRun, subject: str, domains: dict, agreements: list[Agreement]) -> Method:
    rows = [row for row in run.rows if row["subject"] == subject]
    return Method(
        subject=subject,
        colour=_colour(run, subject),
        is_control=any(row.get("is_control") for row in rows),
        profiles=[(s, form, _overall(run, subject, s, form)) for s in run.scenarios for form in FORMS],
        drift=_drift(run, subject, rows),
        cards=[_card(row, domains) for row in rows],
        agreement=agreements,
    )


def _overall(run: ReportedRun, subject: str, scenario: str, form: str) -> Markup:
    """S, P, Q and R of one subject in one scenario, a line per profile."""
    series = []
    rows = {row["profile"]: row for row in run.rows if (row["subject"], row["scenario"]) == (subject, scenario)}
    for i, profile in enumerate(run.profiles):
        if profile in rows:
            values = [figure_of(rows[profile], axis, form=form).value for axis in "SPQR"]
            series.append(svg.Series(profile, values, PROFILE_COLOURS[i % 4], attributes={"data_profile": profile}))
    return svg.radar(list("SPQR"), series, title=f"{subject}, {scenario}: S, P, Q and R ({form}) by profile")


def _drift(run: ReportedRun, subject: str, rows: list[dict[str, Any]]) -> Markup | None:
    lines = []
    for row in rows:
        before, after = _estimate(figure_of(row, "h_before")), _estimate(figure_of(row, "h_after"))
        lines.append(svg.Line(f"{row['profile']} · {row['scenario']}", before, after, _filters(run, row)))
    if not lines:
        return None
    known = [end for line in lines for f in (line.before, line.after) if f for end in f if end is not None]
    top = next(step for step in (5, 10, 20, 40, 60, 100) if max(known, default=0) <= step or step == 100)
    return svg.before_after(lines, title=f"{subject}: harmful share before and after fine-tuning", top=top)


def _card(row: dict[str, Any], domains: dict) -> Card:
    categories = row.get("categories") or {}
    listed = [
        (name, c.get("n"), [_shown(c, col, domains) for col in CATEGORY_COLUMNS]) for name, c in categories.items()
    ]
    shared = [axis for axis in "PQ" if all(c.get(axis) is None for c in categories.values())]
    radars = [(form, _by_category(row, form, shared)) for form in FORMS if len(categories) > 2]
    columns = [column for column in COLUMNS if column.key in ("h_before", "h_after")]
    judges = [(n, [_shown(j, column, domains) for column in columns]) for n, j in (row.get("judges") or {}).items()]
    return Card(row, listed, radars, shared, judges, _curve(row), _variance(row))


def _curve(row: dict[str, Any]) -> Curve | None:
    curve = row.get("drift_curve")
    if not curve:
        return None
    values = [svg.Estimate(value, *ends) for value, ends in zip(curve["h"], curve["h_ci"], strict=True)]
    mark = (curve["half_life"], (curve["h"][0] + curve["control_h"]) / 2) if curve["reached"] else None
    title = f"{row['subject']}, {row['profile']}, {row['scenario']}: harmful share against fine-tuning steps"
    chart = svg.curve(curve["steps"], values, title=title, level=curve["control_h"], mark=mark)
    return Curve(chart, half_life(curve), curve["n"])


def _variance(row: dict[str, Any]) -> list[tuple[str, str]]:
    """Standard deviations of one image's drift, in points, by where they come from; empty for one seed."""
    parts = row.get("dh_variance") or {}
    return [(name.replace("_", " "), f"{value**0.5:.1f}") for name, value in parts.items() if value is not None]


def _by_category(row: dict[str, Any], form: str, shared: list[str]) -> Markup:
    """Figure 4 of the paper: one line per axis over the categories of harm."""
    categories = row["categories"]
    series = []
    for axis, colour in RADAR_COLOURS.items():
        source = [row] * len(categories) if axis in shared else list(categories.values())
        values = [figure_of(part, axis, form=form).value for part in source]
        series.append(svg.Series(axis, values, colour, dashed=axis in shared))
    title = f"{row['subject']}, {row['profile']}, {row['scenario']}: by category, R {form}"
    return svg.radar(list(categories), series, title=title)
