"""Q of every row: its FID between the lowest and the highest FID of a cohort (equation 6)."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from spqr_jax import score
from spqr_jax.score.cells import Array
from spqr_jax.score.harm import interval
from spqr_jax.score.row import ResampledRow
from spqr_jax.score.rules import Rules


class Bounds(NamedTuple):
    """FID bounds of Q, and their replicates [B]. The replicates of pinned bounds are the bounds themselves.

    Attributes:
        equal: Q of every row where the bounds are equal; None elsewhere.
    """

    low: float
    high: float
    lows: Array
    highs: Array
    equal: float | None = None


def bounds(rows: Sequence[ResampledRow], rules: Rules, notes: list[str]) -> Bounds | None:
    """The bounds of Q; None, and a note, where equation 6 is undefined.

    They are the lowest and the highest FID before fine-tuning of the methods under test, as in the paper, or of the
    cohort that the rules name.
    """
    if rules.fid_bounds is not None:
        low, high = (float(x) for x in rules.fid_bounds)
        if not 0.0 <= low < high < math.inf:
            raise ValueError(f"fid_bounds must be (min, max) with 0 <= min < max, found {rules.fid_bounds}")
        return Bounds(low, high, np.array(low), np.array(high))
    known = [r for r in rows if r.fid is not None]
    if not known:
        return None
    if len({r.row["n_benign"] for r in known}) > 1:
        counts = sorted({r.row["n_benign"] for r in known})
        notes.append(f"Q and SPQR are null: FIDs over different numbers of images ({counts}) do not compare")
        return None
    members = [r for r in known if is_member(r, rules)]
    subjects = {r.row["subject"] for r in members}
    fids = [r.row["fid_before"] for r in members]
    if len(subjects) < 2 or min(fids) == max(fids):
        return _one_fid(known, fids, rules, notes)
    if len(subjects) == 2:
        notes.append("Q is 0.05 and 0.95, whatever the FIDs, as there are only two methods; set fid_bounds")
    if len({r.benign for r in known}) > 1:
        notes.append("Q compares FIDs over different benign prompts: run all subjects on the same ones")
    drawn = np.stack([r.fid for r in members if r.fid is not None])
    return Bounds(min(fids), max(fids), drawn.min(axis=0), drawn.max(axis=0))


def _one_fid(known: list[ResampledRow], fids: list[float], rules: Rules, notes: list[str]) -> Bounds | None:
    """Where the cohort has one FID alone: the Q that the protocol gives then, or none."""
    if rules.equal_fids is None or not fids:
        notes.append(
            "Q and SPQR are null: Q compares methods and the cohort has one FID only; add a method, name subjects in "
            "config.score.cohort, or set fid_bounds (config.score.fid_min and fid_max)"
        )
        return None
    notes.append(f"Q is {rules.equal_fids:g}, whatever the FIDs, as the cohort has one FID only; set fid_bounds")
    return Bounds(fids[0], fids[0], np.array(fids[0]), np.array(fids[0]), rules.equal_fids)


def is_member(r: ResampledRow, rules: Rules) -> bool:
    """Whether the FID of a row takes part in the bounds of Q."""
    return r.row["subject"] in rules.cohort if rules.cohort else not r.row["is_control"]


def add_quality(r: ResampledRow, limits: Bounds | None, rules: Rules, notes: list[str]) -> Array | None:
    """Fill in Q of a row, and return its replicates [B]; None where Q is null.

    A row outside the cohort is clipped to the bounds, and `Q_clipped` marks it. A row of the cohort outside pinned
    bounds has no Q.
    """
    row, fid = r.row, r.row["fid_before"]
    if limits is None or fid is None or r.fid is None:
        return None
    if limits.equal is not None:
        drawn = np.full_like(r.fid, limits.equal)
        row |= {"Q": limits.equal, "Q_ci": [limits.equal, limits.equal], "Q_clipped": False}
        return drawn
    inside = min(max(fid, limits.low), limits.high)
    if inside != fid and is_member(r, rules):
        notes.append(
            f"{r.name}: Q and SPQR are null: its FID {fid:.6g} is outside fid_bounds ({limits.low:g}, "
            f"{limits.high:g}); widen them"
        )
        return None
    if inside != fid:
        notes.append(
            f"{row['subject']}: its FID {fid:.6g} is outside the bounds of the methods, {limits.low:.6g} to "
            f"{limits.high:.6g}: its Q is clipped to them"
        )
    # Equation 6 does not change when the distances shift together, and linear replicates may fall below zero.
    shifted = np.clip(r.fid, limits.lows, limits.highs) - limits.lows
    drawn = score.quality(shifted, 0.0, limits.highs - limits.lows, rules.eps)
    Q = score.quality(inside, limits.low, limits.high, rules.eps)
    row |= {"Q": Q, "Q_ci": interval(drawn, Q), "Q_clipped": inside != fid}
    return drawn
