"""Rows of several runs in one table: Q, SPQR and ranks among all of them, by the code that ranks the rows of one run.

S, P, R and every figure of h, CLIP and FID belong to a row alone. Q, SPQR and the rank depend on the company: Q lies
between the lowest and the highest FID of the methods under test. Rows that stand in one table are that company.
Replicates are drawn from the same draws of the same prompts, so ranks and differences are paired as within one run.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from spqr_jax.score import cohort, leaderboard
from spqr_jax.score.row import ResampledRow
from spqr_jax.score.rules import Rules
from spqr_jax.score.stats import Draws


class Joint(NamedTuple):
    """One table.

    Attributes:
        rows: as in leaderboard.json, the best first; those without a score last.
        comparisons: as in leaderboard.json.
        bounds: the FIDs that Q lies between; None where Q is null, or does not depend on them.
        notes: why a figure is null, and what a reader must know.
    """

    rows: list[dict[str, Any]]
    comparisons: list[dict[str, Any]]
    bounds: tuple[float, float] | None
    notes: list[str]


def ranked(rows: Sequence[ResampledRow], rules: Rules, draws: Draws, most_pairs: int | None = None) -> Joint:
    """Rows of one scenario and profile, ranked together. Their dictionaries stay as they are.

    rows: subjects have different names, and P is under its ceiling already (`adherence.scaled`). most_pairs: as in
    `leaderboard.rank_and_compare`. Raises ValueError for a name that occurs twice.
    """
    names = [r.row["subject"] for r in rows]
    if len(set(names)) < len(names):
        raise ValueError(f"rows of one table must have different names, found {names}")
    notes: list[str] = []
    members = [r._replace(row=dict(r.row)) for r in rows]
    bounds = cohort.bounds(members, rules, notes)
    drawn = {r.row["subject"]: leaderboard.add_scores(r, bounds, rules, notes) for r in members}
    key = rules.headline_key
    scores = {n: axes.SPQR for r in members if (axes := drawn[n := r.row["subject"]]) and r.row[key] is not None}
    members.sort(key=lambda r: (r.row[key] is None, -(r.row[key] or 0.0), r.row["subject"]))
    comparisons = leaderboard.rank_and_compare(members, scores, key, notes, draws, most_pairs)
    ends = (bounds.low, bounds.high) if bounds and bounds.equal is None else None
    found = leaderboard.rounded(
        Joint([r.row for r in members], comparisons, ends, list(dict.fromkeys(notes)))._asdict()
    )
    return Joint(**found)
