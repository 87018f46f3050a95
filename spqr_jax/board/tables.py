"""The tables of a board: rows under the same conditions, ranked together."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from spqr_jax.board import references
from spqr_jax.board.conditions import Conditions
from spqr_jax.board.submissions import DIGITS, DRAWS, Entry, Submission
from spqr_jax.score import joint

MOST_PAIRS = 300  # of a table; where there are more, each row is compared with the next one alone
LEVEL = 0.05
Member = tuple[Entry, Submission]


class Line(NamedTuple):
    """A line of a table.

    Attributes:
        row: the row of the submission's leaderboard, with Q, SPQR and the rank among the rows of this table.
        submission: the one with this row.
        also: other submissions with the same results of a subject of the same name.
        copies: lines with the same results under another name.
    """

    entry: Entry
    row: dict[str, Any]
    submission: Submission
    also: tuple[Submission, ...]
    copies: tuple[str, ...]


class Pair(NamedTuple):
    """The difference of two lines, the first minus the second, with the figures of a comparison in leaderboard.json."""

    first: Line
    second: Line
    figures: dict[str, Any]

    @property
    def is_real(self) -> bool:
        """Whether the difference in drift is established, corrected for all pairs that were tested in the table."""
        return bool(self.figures["dh_p_holm"] < LEVEL)


class Table(NamedTuple):
    """Rows under the same conditions, the best first.

    Attributes:
        bounds: the FIDs that Q lies between.
        all_pairs: whether every pair was tested, and not only neighbours.
        notes: why figures are null, and what a reader must know.
        apart: digest of its reference images' features, where most submissions under these conditions have others.
    """

    conditions: Conditions
    lines: list[Line]
    pairs: list[Pair]
    bounds: tuple[float, float] | None
    all_pairs: bool
    notes: list[str]
    apart: str

    @property
    def anchor(self) -> str:
        """Its name in links."""
        return f"t-{self.conditions.id}" + (f"-{self.apart[:DIGITS]}" if self.apart else "")

    @property
    def form(self) -> str:
        """The form of R that ranks it."""
        return self.lines[0].entry.rules.headline


def build(submissions: Iterable[Submission]) -> list[Table]:
    """The tables of verified submissions, in the order of their protocols, backbones, scenarios and profiles."""
    found: dict[str, list[Member]] = {}
    for submission in sorted(submissions, key=lambda s: s.id):
        for entry in submission.entries if submission.verification.verified else ():
            found.setdefault(entry.conditions.id, []).append((entry, submission))
    tables = [_table(own, apart) for members in found.values() for own, apart in _by_reference(members)]
    return sorted(tables, key=lambda t: (*t.conditions[:4], t.anchor))


def _by_reference(members: Sequence[Member]) -> list[tuple[list[Member], str]]:
    """Rows that compare with the same reference images, and "" for the most of them; the digest of others' images."""
    same = references.groups([submission for _, submission in members])
    parts: dict[str, list[Member]] = {}
    for entry, submission in members:
        parts.setdefault(same[submission.reference], []).append((entry, submission))
    most = max(parts, key=lambda digest: (len({submission.id for _, submission in parts[digest]}), digest))
    return [(own, "" if digest == most else digest) for digest, own in parts.items()]


def _table(members: Sequence[Member], apart: str) -> Table:
    shown: dict[tuple[str, str], list[Member]] = {}
    for entry, submission in members:
        shown.setdefault((entry.stated["subject"], entry.evidence), []).append((entry, submission))
    firsts = {own[0][0].scored.row["subject"]: own for own in shown.values()}
    by_evidence: dict[str, list[str]] = {}
    for name, own in firsts.items():
        by_evidence.setdefault(own[0][0].evidence, []).append(name)
    entries = [own[0][0] for own in firsts.values()]
    cohort = tuple(sorted({name for entry in entries for name in entry.rules.cohort}))
    rules = entries[0].rules._replace(cohort=cohort)
    ranked = joint.ranked([entry.scored for entry in entries], rules, DRAWS, MOST_PAIRS)
    lines = []
    for row in ranked.rows:
        name = row["subject"]
        (entry, submission), *others = firsts[name]
        copies = tuple(other for other in by_evidence[entry.evidence] if other != name)
        lines.append(Line(entry, _joined(entry, row), submission, tuple(s for _, s in others), copies))
    pairs = _pairs(ranked.comparisons, {line.entry.scored.row["subject"]: line for line in lines})
    all_pairs = math.comb(len(lines), 2) <= MOST_PAIRS
    return Table(entries[0].conditions, lines, pairs, ranked.bounds, all_pairs, ranked.notes, apart)


def _joined(entry: Entry, row: Mapping[str, Any]) -> dict[str, Any]:
    """The submission's own row, with the figures that depend on the company from the joint one."""
    joined = ("Q", "Q_ci", "Q_clipped", "SPQR", "SPQR_ci", "SPQR_exponential", "SPQR_exponential_ci", "rank", "rank_ci")
    return entry.stated | {name: row[name] for name in joined if name in row}


def _pairs(comparisons: Sequence[Mapping[str, Any]], lines: Mapping[str, Line]) -> list[Pair]:
    return [Pair(lines[found["a"]], lines[found["b"]], dict(found)) for found in comparisons]
