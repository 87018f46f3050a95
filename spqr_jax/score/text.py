"""The leaderboard as text: aligned columns for a terminal, Markdown, and CSV with every interval."""

import csv
import io
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from spqr_jax.files import storage
from spqr_jax.score.row import FIGURES

_HEADER = ["#", "subject", "S", "P", "Q", "R", "SPQR", "95%", "dh", "95%", "R exp", "SPQR exp", "undecided"]
_WIDER = [*_HEADER, "CLIP after", "kept", "95%", "control's h after"]  # a file has room for more
_KEPT = "kept: the share of the safety gained over the control that is left after fine-tuning."


def shown(value: float | None, form: str = ".3f") -> str:
    """A figure for a table, "-" for a null."""
    return "-" if value is None else format(value, form)


def shown_interval(value: list[float] | None, form: str = ".3f") -> str:
    """An interval for a table, "-" for a null."""
    return "-" if value is None else f"{value[0]:{form}}..{value[1]:{form}}"


def figure(row: Mapping[str, Any], name: str, form: str = ".3f") -> tuple[str, str]:
    """A figure of a row and its interval for a table."""
    return shown(row[name], form), shown_interval(row[f"{name}_ci"], form)


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        shown(row["rank"], "d"),
        row["subject"] + (" (control)" if row["is_control"] else ""),
        *(shown(row[name]) for name in ("S", "P", "Q", "R")),
        *figure(row, "SPQR"),
        *figure(row, "dh", "+.1f"),
        *(shown(row[name]) for name in ("R_exponential", "SPQR_exponential")),
        f"{row['undecided_before']}+{row['undecided_after']}",
    ]


def _more_cells(row: dict[str, Any]) -> list[str]:
    return [*_cells(row), shown(row["clip_after"]), *figure(row, "kept"), shown(row["control_h_after"], ".1f")]


def _blocks(rows: list[dict[str, Any]]) -> list[tuple[tuple[str, str], list[dict[str, Any]]]]:
    blocks: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        blocks.setdefault((row["scenario"], row["profile"]), []).append(row)
    return list(blocks.items())


def aligned(lines: Sequence[Sequence[str]], left: Collection[int]) -> list[str]:
    """Lines of cells as lines of text with columns of one width; columns `left` begin at the left, others end right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = (
        [c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    )
    return ["  ".join(cells).rstrip() for cells in padded]


def table(leaderboard: dict[str, Any]) -> str:
    """The leaderboard for a terminal of 120 columns, one block for each scenario and profile, the notes below."""
    lines = [f"protocol {leaderboard['protocol']['label']}", ""]
    for (scenario, profile), rows in _blocks(leaderboard["rows"]):
        lines += [f"{scenario} / {profile}", *aligned([_HEADER, *(_cells(row) for row in rows)], left=(1,)), ""]
    return "\n".join([*lines, *(f"note: {note}" for note in leaderboard["notes"])]).rstrip() + "\n"


def markdown(leaderboard: dict[str, Any]) -> str:
    """The leaderboard as Markdown, one table for each scenario and profile, the notes below."""

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    lines = ["# Leaderboard", "", f"Protocol {leaderboard['protocol']['label']}, {_headline(leaderboard)}.", ""]
    for (scenario, profile), rows in _blocks(leaderboard["rows"]):
        lines += [f"## {scenario} / {profile}", "", line(_WIDER), line(["---"] * len(_WIDER))]
        lines += [*(line(_more_cells(row)) for row in rows), ""]
    lines += ["dh in percentage points; R by equation 3, R exp by exp(-max(dh, 0) / 10).", _KEPT, ""]
    return "\n".join([*lines, *(f"- {note}" for note in leaderboard["notes"])]).rstrip() + "\n"


def _headline(leaderboard: dict[str, Any]) -> str:
    """What ranks the rows, in words."""
    return "ranked by SPQR exp" if leaderboard["protocol"]["headline"] == "exponential" else "ranked by SPQR"


def comma_separated(rows: list[dict[str, Any]]) -> str:
    """The rows as CSV, every figure f with its interval in f_low and f_high. A null is empty."""
    plain = ("subject", "profile", "scenario", "is_control", "protocol")
    counts = ("n_harmful", "n_benign", "undecided_before", "undecided_after")
    return with_intervals(rows, plain, ("rank", *FIGURES), counts)


def write(
    place: Callable[[str], Path],
    found: Mapping[str, Any],
    names: Sequence[str],
    figures: Sequence[str],
    counts: Sequence[str],
) -> None:
    """Write what was found as JSON, and its "rows" as CSV as `with_intervals` does. place: suffix -> file."""
    storage.write_text(place("json"), json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    storage.write_text(place("csv"), with_intervals(found["rows"], names, figures, counts))


def with_intervals(
    rows: Sequence[Mapping[str, Any]], names: Sequence[str], figures: Sequence[str], counts: Sequence[str]
) -> str:
    """Rows as CSV: names, seeds, figures with their intervals in f_low and f_high, counts. A null is empty."""
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow([*names, "seeds", *(c for f in figures for c in (f, f"{f}_low", f"{f}_high")), *counts])
    for row in rows:
        values = [v for f in figures for v in (row[f], *(row[f"{f}_ci"] or (None, None)))]
        named = [*(row[name] for name in names), " ".join(map(str, row["seeds"]))]
        out.writerow([*named, *values, *(row[c] for c in counts)])
    return text.getvalue()
