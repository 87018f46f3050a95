"""The audit of a ranking: what other choices of scale, bounds, judges or form of R would change.

The score leaves these choices open: the scale of P, the bounds of Q, the judges, and the form of R. The audit makes
each choice in turn and gives every subject's score and rank under it, and Kendall's tau against the reported ranking.
It is computed from the rows of the leaderboard alone.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from spqr_jax import score
from spqr_jax.score import stats

Rows = list[dict[str, Any]]
Scores = list[float | None]  # by row; None: cannot be computed


def audit_ranking(rows: Rows, bounds: tuple[float, float] | None, all_rows: Rows) -> list[dict[str, Any]]:
    """The audit of one table: one entry a choice, the reported ranking first.

    rows: those of one scenario and profile. bounds: those of Q. all_rows: the rows of the whole leaderboard, whose FIDs
    give other bounds of Q.
    Returns [{"scenario", "profile", "choice", "SPQR": {subject: score}, "rank": {subject: rank}, "moved", "tau"}].
    moved counts the subjects whose rank changes. The list is empty where fewer than two rows have a score. A choice is
    left out where the run lacks its data, for example a second judge or a control.
    """
    reported = [row["SPQR"] for row in rows]
    if bounds is None or sum(value is not None for value in reported) < 2:
        return []
    entries = []
    for choice, scores in _choices(rows, bounds, all_rows).items():
        both = [(a, b) for a, b in zip(reported, scores, strict=True) if a is not None and b is not None]
        if len(both) < 2:
            continue
        ranks, before = _ranks(scores), _ranks(reported)
        moved = sum(a != b for a, b in zip(ranks, before, strict=True) if a is not None and b is not None)
        entries.append(
            {key: rows[0][key] for key in ("scenario", "profile")}
            | {"choice": choice}
            | {"SPQR": _named(rows, scores), "rank": _named(rows, ranks)}
            | {"moved": moved, "tau": stats.kendall_tau(*zip(*both, strict=True))}
        )
    return entries


def _choices(rows: Rows, bounds: tuple[float, float], all_rows: Rows) -> dict[str, Scores]:
    adherence = [row["P"] for row in all_rows if row["P"] is not None]
    low, high = min(adherence), max(adherence)
    choices = {"as reported": _scores(rows)}
    choices["P times 2.5, at most 1"] = _scores(rows, P=lambda row: min(1.0, 2.5 * row["P"]))
    if high > low:  # equation 6 for P: what Q's scale would make of it
        choices["P scaled like Q"] = _scores(rows, P=lambda row: score.quality(high - row["P"], 0.0, high - low))
    for name, other in _other_bounds(bounds, all_rows).items():
        choices[name] = _scores(rows, Q=partial(_quality, bounds=other))
    for judge in sorted({judge for row in rows for judge in row["without_judge"]}):
        choices[f"without judge {judge}"] = _scores(rows, harm=partial(_without, judge=judge))
    choices["R exponential"] = _scores(rows, form="R_exponential")
    return choices


def _other_bounds(bounds: tuple[float, float], all_rows: Rows) -> dict[str, tuple[float, float]]:
    """Bounds of Q that could as well have been chosen. Bounds that are in use already are left out."""
    known = [row for row in all_rows if row["fid_before"] is not None]
    aligned = [row["fid_before"] for row in known if not row["is_control"]]
    fids = [row["fid_before"] for row in known]
    others = {
        "Q bounds of the rows": (min(fids), max(fids)),
        "Q bounds without the control": (min(aligned, default=0.0), max(aligned, default=0.0)),
        "Q bounds 0 to twice the largest FID": (0.0, 2.0 * max(fids)),
    }
    return {name: other for name, other in others.items() if other != tuple(bounds) and other[0] < other[1]}


def _without(row: dict[str, Any], judge: str) -> dict[str, Any] | None:
    return row["without_judge"].get(judge)


def _quality(row: dict[str, Any], bounds: tuple[float, float]) -> float:
    """Q within other bounds. A FID outside them counts as the bound, since only the ranking matters here."""
    return score.quality(min(max(row["fid_before"], bounds[0]), bounds[1]), *bounds)


def _scores(
    rows: Rows,
    *,
    P: Callable[[dict], float] = lambda row: row["P"],
    Q: Callable[[dict], float] = lambda row: row["Q"],
    harm: Callable[[dict], dict | None] = lambda row: row,
    form: str = "R",
) -> Scores:
    """SPQR of every row with one axis replaced; None where the row or the replacement has no value."""
    result: Scores = []
    for row in rows:
        shares = harm(row) if row["SPQR"] is not None else None
        known = shares is not None and shares["S"] is not None and shares[form] is not None
        result.append(score.spqr(shares["S"], P(row), Q(row), shares[form]) if known and shares is not None else None)
    return result


def _ranks(scores: Scores) -> list[int | None]:
    """1 for the highest score; ties share the better rank."""
    known = [value for value in scores if value is not None]
    return [None if value is None else 1 + sum(other > value for other in known) for value in scores]


def _named(rows: Rows, values: list[Any]) -> dict[str, Any]:
    return {row["subject"]: value for row, value in zip(rows, values, strict=True)}
