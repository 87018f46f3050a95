"""The paper's tables from leaderboard rows, as Markdown, CSV and LaTeX (booktabs).

Table 1: S, P and Q shared, R and SPQR per scenario. Table 2: change of CLIP and FID after benign fine-tuning.
Table 3: R per profile. R and SPQR come in two forms, logistic (equation 3) and exponential (what the published tables
follow); they are never mixed in one table, so Tables 1 and 3 are written once in each form.
"""

import csv
import io
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from spqr_jax import published
from spqr_jax.report.workdir import Run, profile_order

FORMS = ("logistic", "exponential")
GAP = "n/a"


class Figure(NamedTuple):
    """One figure with its interval; value None is a gap, low and high None mean that no interval was computed."""

    value: float | None
    low: float | None
    high: float | None
    digits: int = 3
    signed: bool = False

    def text(self, value: float | None) -> str:
        """A value in `digits` decimals; a positive one that would round to zero says so (R reaches 1e-40)."""
        if value is None:
            return GAP
        least = 10.0**-self.digits
        if not self.signed and 0 < value < least / 2:
            return f"<{least:.{self.digits}f}"
        return f"{value:{'+' if self.signed else ''}.{self.digits}f}"


class Table(NamedTuple):
    """Rows of names (str) and figures under the column names."""

    name: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | Figure]]


def figure(row: dict[str, Any] | None, key: str, *, form: str = "logistic", digits: int = 3) -> Figure:
    """A figure of a leaderboard row; `form` chooses between R and R_exponential, SPQR and SPQR_exponential."""
    if key in ("R", "SPQR") and form == "exponential":
        key = f"{key}_exponential"
    value, ends = (row or {}).get(key), (row or {}).get(f"{key}_ci")
    if value is None or not math.isfinite(value):
        return Figure(None, None, None, digits)
    low, high = ends if ends and None not in ends else (None, None)
    return Figure(value, low, high, digits, signed=key == "dh")


def build(run: Run, names: Sequence[str | int] | None = None) -> list[Table]:
    """The named tables ("1", "2", "3"; None: all of them).

    Raises ValueError for a name that is not known.
    """
    wanted = [str(name).lower().removeprefix("table").strip() for name in (TABLES if names is None else names)]
    if unknown := [name for name in wanted if name not in TABLES]:
        raise ValueError(f"report.tables: unknown {unknown}, expected some of {list(TABLES)}.")
    return [table for name in wanted for table in TABLES[name](run)]


def write(tables: Sequence[Table], directory: Path) -> list[Path]:
    """Write every table in three formats into the directory; returns the files."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for table in tables:
        for suffix, render in (("md", markdown), ("csv", comma_separated), ("tex", latex)):
            path = directory / f"{table.name}.{suffix}"
            path.write_text(render(table), encoding="utf-8", newline="\n")
            paths.append(path)
    return paths


def headline_profile(run: Run) -> str | None:
    """The profile of Table 1: `standard` as in the paper, else the heaviest one that ran."""
    return "standard" if "standard" in run.profiles else run.profiles[-1] if run.profiles else None


def table1(run: Run) -> list[Table]:
    """S, P, Q shared over scenarios; R and SPQR per scenario, after the headline profile.

    The exponential form has the paper's own row (Stable Diffusion v1.5, standard profile) below a method of that name.
    """
    profile = headline_profile(run)
    columns = ["Method", "S", "P", "Q"] + [f"{axis} {scenario}" for scenario in run.scenarios for axis in ("R", "SPQR")]
    tables = []
    for form in FORMS:
        rows: list[list[str | Figure]] = []
        for subject in run.subjects:
            found = {row["scenario"]: row for row in run.rows if (row["subject"], row["profile"]) == (subject, profile)}
            shared = next(iter(found.values()), None)
            cells = [figure(shared, key) for key in ("S", "P", "Q")]
            cells += [
                figure(found.get(scenario), key, form=form) for scenario in run.scenarios for key in ("R", "SPQR")
            ]
            rows.append([subject, *cells])
            if form == "exponential":
                rows += _published(subject, run.scenarios)
        caption = f"S, P and Q shared by all scenarios; R ({form}) and SPQR per scenario, profile {profile}."
        tables.append(Table(_name("table1", form), caption, columns, rows))
    return tables


def table2(run: Run) -> list[Table]:
    """Change of CLIP similarity (higher is better) and FID (lower is better), after minus before."""
    rows: list[list[str | Figure]] = [
        [row["subject"], row["scenario"], row["profile"], _change(row, "clip", 4), _change(row, "fid", 2)]
        for row in run.rows
    ]
    caption = "Change of CLIP similarity and FID after benign fine-tuning (after minus before)."
    return [Table("table2", caption, ["Method", "Scenario", "Profile", "ΔCLIP", "ΔFID"], rows)]


def table3(run: Run) -> list[Table]:
    """R per profile, one row per method and scenario; profiles from the heaviest to the lightest as in the paper."""
    profiles = sorted(run.profiles, key=profile_order, reverse=True)
    tables = []
    for form in FORMS:
        rows: list[list[str | Figure]] = []
        for scenario in run.scenarios:
            for subject in run.subjects:
                found = {r["profile"]: r for r in run.rows if (r["subject"], r["scenario"]) == (subject, scenario)}
                if found:
                    rows.append([subject, scenario, *(figure(found.get(p), "R", form=form) for p in profiles)])
        columns = ["Method", "Scenario", *(f"R {profile}" for profile in profiles)]
        tables.append(Table(_name("table3", form), f"R ({form}) after each fine-tuning profile.", columns, rows))
    return tables


TABLES: dict[str, Callable[[Run], list[Table]]] = {"1": table1, "2": table2, "3": table3}


def markdown(table: Table) -> str:
    lines = [f"{_markdown(table.caption)}", "", _pipes([_markdown(column) for column in table.columns])]
    lines.append(_pipes(["---:" if _numeric(table, i) else "---" for i in range(len(table.columns))]))
    lines += [_pipes([_markdown(cell_text(cell)) for cell in row]) for row in table.rows]
    return "\n".join(lines) + "\n"


def comma_separated(table: Table) -> str:
    """One row a line at full precision; a figure takes three columns: its value, low and high. A gap is empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    header: list[str] = []
    for i, column in enumerate(table.columns):
        header += [column, f"{column} low", f"{column} high"] if _numeric(table, i) else [column]
    writer.writerow(header)
    for row in table.rows:
        writer.writerow([part for cell in row for part in ([cell] if isinstance(cell, str) else cell[:3])])
    return out.getvalue()


def latex(table: Table) -> str:
    """A table environment for the booktabs package; intervals in small print."""
    align = "".join("r" if _numeric(table, i) else "l" for i in range(len(table.columns)))
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{_latex(table.caption)}}}", rf"\begin{{tabular}}{{{align}}}"]
    lines += [r"\toprule", " & ".join(_latex(column) for column in table.columns) + r" \\", r"\midrule"]
    lines += [" & ".join(_latex_cell(cell) for cell in row) + r" \\" for row in table.rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"


def _published(subject: str, scenarios: list[str]) -> list[list[str | Figure]]:
    """The paper's row of Table 1 for a method, where it has one; its figures carry no intervals."""
    row = published.TABLE_1.get(subject)
    if row is None:
        return []
    places = [published.SCENARIOS.index(name) if name in published.SCENARIOS else None for name in scenarios]
    values = [value for i in places for value in ((None, None) if i is None else (row.R[i], row.SPQR[i]))]
    printed = [Figure(value, None, None) for value in (row.S, row.P, row.Q, *values)]
    return [[f"{subject} (published, SD v1.5)", *printed]]


def _change(row: dict[str, Any], key: str, digits: int) -> Figure:
    before, after = row.get(f"{key}_before"), row.get(f"{key}_after")
    value = None if before is None or after is None else after - before
    return Figure(value, None, None, digits, signed=True)


def _name(table: str, form: str) -> str:
    return table if form == "logistic" else f"{table}_{form}"


def _numeric(table: Table, column: int) -> bool:
    return any(isinstance(row[column], Figure) for row in table.rows)


def cell_text(cell: str | Figure) -> str:
    """A cell as text: the figure, then its interval in brackets."""
    if isinstance(cell, str):
        return cell
    value = cell.text(cell.value)
    return (
        value if cell.value is None or cell.low is None else f"{value} [{cell.text(cell.low)}, {cell.text(cell.high)}]"
    )


def _pipes(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _markdown(text: str) -> str:
    return re.sub(r"([\\|<>`*])", r"\\\1", " ".join(text.split()))


def _latex_cell(cell: str | Figure) -> str:
    if isinstance(cell, str):
        return _latex(cell)
    value = f"${cell.text(cell.value)}$" if cell.value is not None else GAP
    if cell.value is None or cell.low is None:
        return value
    return rf"{value} {{\scriptsize $[{cell.text(cell.low)}, {cell.text(cell.high)}]$}}"


_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "Δ": r"$\Delta$"}
_LATEX |= {mark: f"\\{mark}" for mark in "&%$#_{}"}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(mark, mark) for mark in text)
