"""A table of figures with intervals, and how it is written: Markdown, CSV, LaTeX (booktabs) and JSON."""

import csv
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from spqr_jax import score

FORMS = score.R_FORMS
GAP = "n/a"


class Figure(NamedTuple):
    """One figure with its interval. A value of None is a gap; low and high of None mean that there is no interval."""

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


TableRow = list[str | Figure]


class Table(NamedTuple):
    """A table whose rows hold names, as text, and figures."""

    name: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | Figure]]

    @property
    def title(self) -> str:
        """Table 1, Table D, Audit."""
        name = self.name.split("_")[0]
        return name.replace("table", "Table ") if name.startswith("table") else name.capitalize()


def figure_of(row: dict[str, Any] | None, key: str, *, form: str = "logistic", digits: int = 3) -> Figure:
    """A figure of a leaderboard row; `form` chooses between R and R_exponential, SPQR and SPQR_exponential."""
    key = score.column(key, form) if key in ("R", "SPQR") else key
    value, ends = (row or {}).get(key), (row or {}).get(f"{key}_ci")
    if value is None or not math.isfinite(value):
        return Figure(None, None, None, digits)
    low, high = ends if ends and None not in ends else (None, None)
    return Figure(value, low, high, digits, signed=key in ("dh", "dclip", "dfid", "rise", "dunsafe"))


def plain(value: float | None, *, digits: int = 3, signed: bool = False) -> Figure:
    """A figure without an interval; None is a gap."""
    return Figure(value, None, None, digits, signed)


def both_forms(
    name: str, caption: str, columns: Sequence[str], lines: Callable[[str], list[TableRow]], note: str = ""
) -> list[Table]:
    """A table with R once in each form: form -> rows. `(form)` in the caption names it; `note` ends the exponential."""
    names = {"logistic": name, "exponential": f"{name}_exponential"}
    notes = {"logistic": "", "exponential": note}
    captions = {form: caption.replace("(form)", f"({form})", 1) + notes[form] for form in FORMS}
    return [Table(names[form], captions[form], columns, lines(form)) for form in FORMS]


def write(tables: Sequence[Table], directory: Path) -> list[Path]:
    """Write every table in four formats into the directory; returns the files."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for table in tables:
        for suffix, render in (("md", markdown), ("csv", comma_separated), ("tex", latex), ("json", as_json)):
            path = directory / f"{table.name}.{suffix}"
            path.write_text(render(table), encoding="utf-8", newline="\n")
            paths.append(path)
    return paths


def markdown(table: Table) -> str:
    """The table as Markdown, below its caption."""
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


def as_json(table: Table) -> str:
    """Rows as objects by column; a figure is {"value", "low", "high"} at full precision, a gap has nulls."""
    rows = [
        {
            name: cell if isinstance(cell, str) else dict(zip(("value", "low", "high"), cell[:3], strict=True))
            for name, cell in zip(table.columns, row, strict=True)
        }
        for row in table.rows
    ]
    content = {"name": table.name, "caption": table.caption, "columns": list(table.columns), "rows": rows}
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


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
