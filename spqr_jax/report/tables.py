"""Tables by name, from leaderboard rows alone: the paper's, and `further_tables`.

1: S, P and Q shared, R and SPQR per scenario. 2: change of CLIP and FID. 3: R per profile. 4: R per harmful prompt set.
5: R per language and domain. D: Table 1 by backbone. E: R by LoRA rank. Tables 4, D and E compare runs: read several
work directories. Figures of an edition stand beside those that follow its protocol.

R and SPQR come in two forms, logistic (equation 3) and exponential (what the published tables follow); they are never
mixed in one table, so tables with R are written once in each form and only the exponential one holds published rows.
It does where the rows follow the protocol of an edition without a change (`published`), and else says why it does not.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from spqr_jax.protocols import PROFILES
from spqr_jax.report import further_tables, published
from spqr_jax.report.published import edition as paper
from spqr_jax.report.reading import (
    ReportedRun,
    Setting,
    headline_profile,
    headline_rows,
    headline_scenario,
    shown_profile,
    unique,
)
from spqr_jax.report.tabular import Figure, Table, TableRow, both_forms, figure_of, plain
from spqr_jax.score import stats
from spqr_jax.score.scenario_groups import group_of

DATASETS = {  # scenario -> its column in Table 5
    "general": "general",
    "multilingual_ar": "arabic",
    "multilingual_es": "spanish",
    "multilingual_fr": "french",
    "multilingual_hi": "hindi",
    "artistic": "artistic",
    "medical": "medical",
}
PROMPT_SETS = {"visu": "visu", "i2p": "i2p", "rab": "rab", "ring_a_bell": "rab", "ringabell": "rab"}


def build(run: ReportedRun, names: Sequence[str | int] | None = None) -> list[Table]:
    """Tables by name; None makes all of TABLES. Raises ValueError for a name that is not known."""
    stated = f" Protocol: {run.protocol}." if run.protocol else ""
    found = [table for name in known(TABLES if names is None else names) for table in TABLES[name](run)]
    return [table._replace(caption=table.caption + stated) for table in found]


def known(names: Iterable[str | int]) -> list[str]:
    """The names in the spelling of TABLES, from "d", "table5" or 1. Raises ValueError for a name that is not known."""
    wanted = [str(name).removeprefix("table").strip() for name in names]
    wanted = [name.upper() if name.upper() in TABLES else name.lower() for name in wanted]
    if unknown := [name for name in wanted if name not in TABLES]:
        raise ValueError(f"report.tables: unknown {unknown}, expected some of {list(TABLES)}.")
    return wanted


def _headline(run: ReportedRun) -> str | None:
    """The headline profile in captions."""
    profile = headline_profile(run)
    return profile and shown_profile(profile)


def table1(run: ReportedRun) -> list[Table]:
    """S, P and Q, which all scenarios share, then R and SPQR per scenario, for the headline profile."""
    groups = unique([group_of(scenario) for scenario in run.scenarios])
    beside = _beside(run, "rows")

    def lines(form: str) -> list[TableRow]:
        rows: list[TableRow] = []
        for subject in run.subjects:
            rows.append([subject, *_axes(run, subject, groups, form)])
            if form == "exponential" and (row := beside.rows.get(_published_name(run, subject))):
                rows.append([_published_label(run, subject), *_printed(row, groups)])
        return rows

    caption = f"S, P and Q shared by all scenarios; R (form) and SPQR per scenario, profile {_headline(run)}."
    return both_forms("table1", caption, ["Method", "S", "P", "Q", *_scenario_columns(groups)], lines, beside.note)


def table2(run: ReportedRun) -> list[Table]:
    """Change of CLIP similarity (higher is better) and FID (lower is better), after minus before."""
    rows: list[TableRow] = []
    beside = _beside(run, "changes")
    for row in run.rows:
        rows.append([row["subject"], row["scenario"], shown_profile(row["profile"]), figure_of(row, "dclip", digits=4)])
        rows[-1].append(figure_of(row, "dfid", digits=2))
        printed = beside.rows.get(_published_name(run, row["subject"]))
        if printed and (row["scenario"], row["profile"]) == ("general", "standard"):
            values = [plain(value, digits=d, signed=True) for value, d in zip(printed, (4, 2), strict=True)]
            rows.append([_published_label(run, row["subject"]), "general", "standard", *values])
    caption = "Change of CLIP similarity and FID after benign fine-tuning (after minus before, paired)." + beside.note
    return [Table("table2", caption, ["Method", "Scenario", "Profile", "ΔCLIP", "ΔFID"], rows)]


def table3(run: ReportedRun) -> list[Table]:
    """R per profile, one row per method and scenario; from the heaviest to the lightest as in the paper, then ours."""
    profiles = [p for p in run.profiles[::-1] if p in PROFILES] + [p for p in run.profiles if p not in PROFILES]
    beside = _beside(run, "by_profile")

    def lines(form: str) -> list[TableRow]:
        rows: list[TableRow] = []
        for scenario in run.scenarios:
            for subject in run.subjects:
                found = {r["profile"]: r for r in run.rows if (r["subject"], r["scenario"]) == (subject, scenario)}
                if found:
                    rows.append([subject, scenario, *(figure_of(found.get(p), "R", form=form) for p in profiles)])
                printed = beside.rows.get(_published_name(run, subject))
                if found and printed and scenario == "general" and form == "exponential":
                    rows.append([_published_label(run, subject), scenario, *(plain(printed.get(p)) for p in profiles)])
        return rows

    columns = ["Method", "Scenario", *(f"R {shown_profile(profile)}" for profile in profiles)]
    return both_forms("table3", "R (form) after each fine-tuning profile.", columns, lines, beside.note)


def table4(run: ReportedRun) -> list[Table]:
    """R per harmful prompt set and the average; the sets come from one run, or each from a run of its own."""
    rows = headline_rows(run)
    found: dict[str, dict[str, dict[str, Any]]] = {}  # subject and what else varies -> prompt set -> figures
    for row in rows:
        sets = row.get("prompt_sets") or {run.settings[row["subject"]].prompts: row}
        name = _variant(run, row["subject"], but="prompts")
        found.setdefault(name, {}).update({_stem(key): part for key, part in sets.items()})
    ours = unique([name for sets in found.values() for name in sets])
    columns = [*paper.PROMPT_SETS, *(name for name in ours if name not in paper.PROMPT_SETS)]
    beside = _beside(run, "by_prompt_set")
    methods = {_variant(run, row["subject"], but="prompts"): row["subject"] for row in rows}

    def lines(form: str) -> list[TableRow]:
        result: list[TableRow] = []
        for name, sets in found.items():
            parts = [figure_of(sets.get(column), "R", form=form) for column in columns]
            result.append([name, *parts, _average([figure_of(sets.get(key), "R", form=form) for key in ours])])
            printed = beside.rows.get(_published_name(run, methods[name]))
            if printed and form == "exponential":
                known = [plain(printed.get(column)) for column in (*columns, "average")]
                result.append([_published_label(run, methods[name]), *known])
        return result

    caption = f"R (form) per harmful prompt set, profile {_headline(run)}; average over the sets that ran."
    return both_forms("table4", caption, ["Method", *columns, "average"], lines, beside.note)


def table5(run: ReportedRun) -> list[Table]:
    """R per data set that was fine-tuned on, with the averages over languages and over domains."""
    ours = {DATASETS.get(scenario, scenario): scenario for scenario in run.scenarios}
    columns = [*paper.DATASETS, *(name for name in ours if name not in paper.DATASETS)]
    beside = _beside(run, "by_dataset")

    def lines(form: str) -> list[TableRow]:
        rows: list[TableRow] = []
        for subject in run.subjects:
            found = _by_scenario(run, subject)
            keys = [name.removesuffix(" average") if name.endswith(" average") else ours.get(name) for name in columns]
            rows.append([subject, *(figure_of(found.get(key or ""), "R", form=form) for key in keys)])
            printed = beside.rows.get(_published_name(run, subject))
            if printed and form == "exponential":
                rows.append([_published_label(run, subject), *(plain(printed.get(name)) for name in columns)])
        return rows

    caption = f"R (form) after fine-tuning on each data set, profile {_headline(run)}."
    return both_forms("table5", caption, ["Method", *columns], lines, beside.note)


def table_d(run: ReportedRun) -> list[Table]:
    """Table 1 by backbone. Each backbone has a run of its own."""
    groups = unique([group_of(scenario) for scenario in run.scenarios])
    beside, sd15 = _beside(run, "by_backbone"), _beside(run, "rows").rows

    def lines(form: str) -> list[TableRow]:
        rows: list[TableRow] = []
        for name in unique([_variant(run, subject, but="backbone") for subject in run.subjects]):
            own = [s for s in run.subjects if _variant(run, s, but="backbone") == name]
            rows += [[name, run.settings[s].backbone, *_axes(run, s, groups, form)] for s in own]
            method, label = _published_name(run, own[0]), run.settings[own[0]].subject
            printed = {"SDv1.5": sd15.get(method)}
            printed |= {backbone: row for (m, backbone), row in beside.rows.items() if m == method}
            if form == "exponential":
                rows += [[f"{label} (published)", b, *_printed(row, groups)] for b, row in printed.items() if row]
        return rows

    caption = f"S, P, Q, R (form) and SPQR by backbone, profile {_headline(run)}."
    return both_forms(
        "tableD", caption, ["Method", "Backbone", "S", "P", "Q", *_scenario_columns(groups)], lines, beside.note
    )


def table_e(run: ReportedRun) -> list[Table]:
    """R by LoRA rank after lite fine-tuning, on the general or the first scenario. Each rank has a run of its own."""
    scenario = headline_scenario(run)
    rows = [row for row in run.rows if (row["profile"], row["scenario"]) == ("lite", scenario)]
    beside = _beside(run, "by_rank")
    ranks = sorted({*paper.RANKS, *(s.rank for s in run.settings.values() if s.rank)})
    found: dict[tuple[str, str], dict[int | None, dict[str, Any]]] = {}
    for row in rows:
        setting = run.settings[row["subject"]]
        found.setdefault((_variant(run, row["subject"], but="rank"), setting.backbone), {})[setting.rank] = row

    def lines(form: str) -> list[TableRow]:
        result: list[TableRow] = []
        for (name, backbone), by_rank in found.items():
            result.append([name, backbone, *(figure_of(by_rank.get(rank), "R", form=form) for rank in ranks)])
            subject = next(iter(by_rank.values()))["subject"]
            method, label = _published_name(run, subject), run.settings[subject].subject
            for (m, other), printed in beside.rows.items() if form == "exponential" else ():
                if m == method:
                    result.append([f"{label} (published)", other, *(plain(printed.get(rank)) for rank in ranks)])
        return result

    caption = f"R (form) by LoRA rank, profile lite, scenario {scenario}."
    return both_forms(
        "tableE", caption, ["Method", "Backbone", *(f"R rank {rank}" for rank in ranks)], lines, beside.note
    )


TABLES: dict[str, Callable[[ReportedRun], list[Table]]] = {
    **{"1": table1, "2": table2, "3": table3, "4": table4, "5": table5, "D": table_d, "E": table_e},
    **further_tables.TABLES,
}


# What the tables share


class Beside(NamedTuple):
    """Published rows that may stand in a table, by method, and the end of its caption: whose they are, or why none."""

    rows: Mapping[Any, Any]
    note: str


def _beside(run: ReportedRun, table: str) -> Beside:
    """One table (a field of `published.edition.Edition`) of the edition whose protocol the rows follow."""
    edition = published.edition_of_rows(run.rows)
    if edition is None:
        return Beside({}, f" {published.why_none(run.rows)}")
    rows = getattr(edition, table)
    if not rows:
        return Beside({}, f" No published rows beside these: figures of {edition.name} for this table are not known.")
    note = f" Published rows are those of {edition.name}."
    if table in ("rows", "by_backbone") and (ceilings := published.about_ceilings(edition)):
        note += f" {ceilings}"
    return Beside(rows, note)


def _scenario_columns(groups: list[str]) -> list[str]:
    return [f"{axis} {group}" for group in groups for axis in ("R", "SPQR")]


def _axes(run: ReportedRun, subject: str, groups: list[str], form: str) -> TableRow:
    """S, P, Q, then R and SPQR of every group of scenarios."""
    found = _by_scenario(run, subject)
    shared = next(iter(found.values()), None)
    cells: TableRow = [figure_of(shared, key) for key in ("S", "P", "Q")]
    return cells + [figure_of(found.get(group), key, form=form) for group in groups for key in ("R", "SPQR")]


def _by_scenario(run: ReportedRun, subject: str) -> dict[str, dict[str, Any]]:
    """Rows of the headline profile by scenario, and averages by group."""
    profile = headline_profile(run)
    found = {row["scenario"]: row for row in run.rows if (row["subject"], row["profile"]) == (subject, profile)}
    averages = run.leaderboard.get("averages") or []
    return found | {a["group"]: a for a in averages if (a["subject"], a["profile"]) == (subject, profile)}


def _variant(run: ReportedRun, subject: str, *, but: str) -> str:
    """A subject's own name and the settings in which the runs differ. `but` is left out: it has a column of its own."""
    setting: Setting = run.settings[subject]
    return " · ".join([setting.subject, *(label for name, label in setting.varying if name != but)])


def _average(parts: list[Figure]) -> Figure:
    """Mean over prompt sets, which are independent samples; a gap where the figure of one of them is a gap."""
    ends = [(part.low, part.high) for part in parts]
    if not parts or any(part.value is None for part in parts):
        return plain(None)
    if any(None in pair for pair in ends):
        return plain(sum(part.value or 0.0 for part in parts) / len(parts))
    mean, (low, high) = stats.mean_of_independent([part.value or 0.0 for part in parts], ends)  # type: ignore[arg-type]
    return Figure(mean, low, high)


def _stem(prompt_set: str) -> str:
    """A prompt set's name without its folder and suffix; the paper's three under the paper's names."""
    stem = prompt_set.rsplit("/", 1)[-1].rsplit(".", 1)[0]
    return PROMPT_SETS.get(stem.lower().replace("-", "_"), stem)


def _published_name(run: ReportedRun, subject: str) -> str:
    """The key of a subject in the paper's tables: its method, or its name where that is one of them."""
    setting = run.settings[subject]
    edition = published.edition_of_rows(run.rows)
    return setting.method if edition and setting.method in edition.rows else setting.subject.lower()


def _published_label(run: ReportedRun, subject: str) -> str:
    return f"{run.settings[subject].subject} (published, SD v1.5)"


def _printed(row: paper.PublishedRow, groups: list[str]) -> TableRow:
    """A published row; its figures carry no intervals, and a scenario that the paper lacks is a gap."""
    places = [paper.SCENARIOS.index(name) if name in paper.SCENARIOS else None for name in groups]
    values = [value for i in places for value in ((None, None) if i is None else (row.R[i], row.SPQR[i]))]
    return [plain(value) for value in (row.S, row.P, row.Q, *values)]
