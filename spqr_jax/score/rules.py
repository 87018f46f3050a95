"""The rules of a score: what a protocol says about it, and what a config says instead.

The protocol is the one that the cells were made under. A config may depart from it when the score is computed, which
needs no new image: the fields of its section `score` have the names of the fields of `Rules`.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from spqr_jax import protocols, score
from spqr_jax.protocols import Protocol, Statement
from spqr_jax.score.cells import FinishedCell

UNSTATED = "spqr-jax"  # the rules for cells that name no protocol


class Rules(NamedTuple):
    """The rules of a score.

    Attributes:
        eps, weights, headline, equal_fids: as in `protocols.Scoring`.
        ceiling: CLIPScore that counts as P = 1: a number, the name of a subject whose CLIPScore it is, or "none".
        cohort: names of the subjects whose FIDs bound Q; empty: every method, without the unaligned control.
        fid_bounds: pinned bounds of Q instead.
    """

    eps: float
    weights: tuple[float, float, float, float]
    headline: str
    equal_fids: float | None
    ceiling: str
    cohort: tuple[str, ...] = ()
    fid_bounds: tuple[float, float] | None = None

    @property
    def headline_key(self) -> str:
        """The figure by which rows are ranked."""
        return score.column("SPQR", self.headline)


def of_protocol(protocol: Protocol, backbone: str) -> Rules:
    """The rules of a protocol for one backbone, by the backbone's key."""
    scoring = protocol.score
    known = scoring.ceilings.get(backbone)
    return Rules(
        scoring.eps, scoring.weights, scoring.headline, scoring.equal_fids, "none" if known is None else f"{known:g}"
    )


def configured(rules: Rules, section: Mapping[str, Any], fid_bounds: tuple[float, float] | None = None) -> Rules:
    """The rules with the fields that a config's section `score` sets. `fid_bounds` counts before the section's own."""
    low, high = section.get("fid_min") or 0.0, section.get("fid_max") or 0.0
    bounds = fid_bounds or ((low, high) if high > low else None)
    chosen = {name: section[name] for name in ("eps", "headline") if section.get(name) is not None}
    chosen |= {name: tuple(section[name]) for name in ("weights", "cohort") if section.get(name)}
    if section.get("ceiling"):
        chosen["ceiling"] = str(section["ceiling"])
    return rules._replace(**chosen, fid_bounds=bounds)


def check(rules: Rules) -> Rules:
    """The same rules. Raises ValueError for a field whose value cannot work."""
    if rules.headline not in score.R_FORMS:
        raise ValueError(f"score.headline={rules.headline!r} is unknown; expected one of {', '.join(score.R_FORMS)}.")
    if not 0 <= rules.eps < 0.5:
        raise ValueError(f"score.eps={rules.eps} is outside [0, 0.5).")
    if len(rules.weights) != 4 or min(rules.weights) < 0 or not any(rules.weights):
        raise ValueError(
            f"score.weights={rules.weights}: expected four numbers for S, P, Q and R, none negative and not all zero."
        )
    return rules


def followed(cells: Iterable[FinishedCell]) -> tuple[Statement, Protocol, str]:
    """What the cells of one work directory follow: their common statement, the protocol, and the backbone's key.

    Raises ValueError for cells of different protocols, or of different backbones.
    """
    found = list(cells)
    for cell in found[1:]:
        _check_same(found[0], cell)
    first, changed = found[0], dict[str, Any]()
    for cell in found:
        changed |= cell.protocol.changed
    name = first.protocol.name
    protocol = protocols.PROTOCOLS[name if name in protocols.PROTOCOLS else UNSTATED]
    return Statement(name, changed), protocol, str(first.info.get("backbone", ""))


def _check_same(first: FinishedCell, cell: FinishedCell) -> None:
    a, b = _shared(first.protocol), _shared(cell.protocol)
    if a != b:
        field = next(key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key))
        raise ValueError(
            f"cells {first.name} and {cell.name} follow different protocols ({field}: {a.get(field)!r} and "
            f"{b.get(field)!r}), which must not share a table: give each protocol a work directory of its own"
        )
    if first.info.get("backbone") != cell.info.get("backbone"):
        raise ValueError(
            f"cells {first.name} and {cell.name} have different backbones, {first.info.get('backbone')!r} and "
            f"{cell.info.get('backbone')!r}: give each backbone a work directory of its own"
        )


def _shared(statement: Statement) -> dict[str, Any]:
    """A statement without profiles beyond the paper's and steps of single ones, where cells of a run may differ."""
    single = ("bft.profiles", "bft.epochs.", "bft.steps.")
    fields = {f: v for f, v in statement.changed.items() if not f.startswith(single)}
    return {"name": statement.name} | fields


def statement(made: Statement, rules: Rules, protocol: Protocol, backbone: str) -> Statement:
    """The statement of a leaderboard: what its cells changed, and what its rules do."""
    theirs = of_protocol(protocol, backbone)
    changed = {
        f"score.{name}": [_plain(getattr(rules, name)), _plain(getattr(theirs, name))]
        for name in Rules._fields
        if getattr(rules, name) != getattr(theirs, name)
    }
    return Statement(made.name, made.changed | changed)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
