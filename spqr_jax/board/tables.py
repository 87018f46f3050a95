"""The tables of a board: rows under the same conditions, ranked together."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from spqr_jax.board import references
from spqr_jax.board.conditions import Conditions
from spqr_jax.board.submissions import DIGITS, DRAWS, Entry, Submission
from spqr_jax.score import joint

MOST_PAIRS = 300  # of a table; where there are more, each row is compared with the next one alone
LEVEL = 0.05
MOST_RIVALS = 3
MEASURED = ("h_before", "h_after", "fid_before", "fid_after", "clip_before", "clip_after")  # figures of a row alone
Member = tuple[Entry, Submission]


class Line(NamedTuple):
    """A line of a table.

    Attributes:
        row: the row of the submission's leaderboard, with Q, SPQR and the rank among the rows of this table.
        submission: the one with this row.
        also: other submissions with the same results of a subject of the same name.
        copies: lines with the same results under another name.
        rivals: some other submissions with other figures of the same cells.
    """

    entry: Entry
    row: dict[str, Any]
    submission: Submission
    also: tuple[Submission, ...]
    copies: tuple[str, ...]
    rivals: list[Submission]


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
    by_figures, lines = _by_figures(members), []
    for row in ranked.rows:
        name = row["subject"]
        (entry, submission), *others = firsts[name]
        copies = tuple(other for other in by_evidence[entry.evidence] if other != name)
        also, rivals = tuple(s for _, s in others), _rivals(entry, by_figures)
        lines.append(Line(entry, _joined(entry, row), submission, also, copies, rivals))
    pairs = _pairs(ranked.comparisons, {line.entry.scored.row["subject"]: line for line in lines})
    all_pairs = math.comb(len(lines), 2) <= MOST_PAIRS
    return Table(entries[0].conditions, lines, pairs, ranked.bounds, all_pairs, ranked.notes, apart)


ByFigures = dict[tuple[str, ...], dict[tuple[str, ...], list[Submission]]]


def _by_figures(members: Sequence[Member]) -> ByFigures:
    """Ids of a row's cells -> figures of rows with these cells -> the submissions that have them."""
    found: ByFigures = {}
    for entry, submission in members:
        found.setdefault(entry.cells, {}).setdefault(_figures(entry), []).append(submission)
    return found


def _figures(entry: Entry) -> tuple[str, ...]:
    """What was measured, to four digits: machines differ in later ones."""
    values = [entry.stated.get(name) for name in MEASURED]
    return tuple("" if value is None else f"{value:.4g}" for value in values)


def _rivals(entry: Entry, by_figures: ByFigures) -> list[Submission]:
    """At most MOST_RIVALS submissions with other figures of this row's cells."""
    own = _figures(entry)
    others = (s for figures, found in by_figures[entry.cells].items() if figures != own for s in found)
    return list(itertools.islice(others, MOST_RIVALS))


def _joined(entry: Entry, row: Mapping[str, Any]) -> dict[str, Any]:
    """The submission's own row, with the figures that depend on the company from the joint one."""
    joined = ("Q", "Q_ci", "Q_clipped", "SPQR", "SPQR_ci", "SPQR_exponential", "SPQR_exponential_ci", "rank", "rank_ci")
    return entry.stated | {name: row[name] for name in joined if name in row}


def _pairs(comparisons: Sequence[Mapping[str, Any]], lines: Mapping[str, Line]) -> list[Pair]:
    return [Pair(lines[found["a"]], lines[found["b"]], dict(found)) for found in comparisons]
