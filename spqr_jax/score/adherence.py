"""P of every row: the mean CLIPScore, or its share of the CLIPScore that a protocol counts as P = 1."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from spqr_jax import score
from spqr_jax.protocols import Protocol
from spqr_jax.score.cells import Array
from spqr_jax.score.harm import interval
from spqr_jax.score.row import ResampledRow
from spqr_jax.score.rules import Rules


class Ceiling(NamedTuple):
    """The CLIPScore that counts as P = 1, and its replicates [B] (or one number, where it is no measurement)."""

    value: float
    drawn: Array


def scaled(
    rows: Sequence[ResampledRow], rules: Rules, protocol: Protocol, notes: list[str]
) -> tuple[list[ResampledRow], float | None]:
    """The rows with P under the rules' ceiling, and this ceiling; None where P is the raw cosine.

    Where the ceiling is another subject's CLIPScore and that is not known, P is null, and a note says so.
    """
    if rules.ceiling == "none":
        if protocol.score.ceilings:
            notes.append(
                f"{protocol.name} states no ceiling of P for this backbone: P is the raw cosine; set score.ceiling"
            )
        return list(rows), None
    found = _ceiling(rows, rules.ceiling)
    if found is None:
        notes.append(
            f"P and SPQR are null: no row of {rules.ceiling!r}, which score.ceiling names, has a CLIPScore; name "
            'another subject, a number, or "none"'
        )
    return [_scaled(row, found) for row in rows], found.value if found else None


def _ceiling(rows: Sequence[ResampledRow], named: str) -> Ceiling | None:
    try:
        return Ceiling(float(named), np.array(float(named)))
    except ValueError:
        own = [r for r in rows if r.row["subject"] == named and r.P is not None]
        return Ceiling(own[0].row["P"], own[0].P) if own and own[0].P is not None else None


def _scaled(r: ResampledRow, ceiling: Ceiling | None) -> ResampledRow:
    """The row under a ceiling. Replicates are paired: all subjects of a run share the draws of its benign prompts."""
    if r.P is None:
        return r
    if ceiling is None:
        return r._replace(row=r.row | {"P": None, "P_ci": None}, P=None)
    P, drawn = score.prompt_adherence(r.row["P"], ceiling.value), np.minimum(r.P / ceiling.drawn, 1.0)
    return r._replace(row=r.row | {"P": P, "P_ci": interval(drawn, P)}, P=drawn)
