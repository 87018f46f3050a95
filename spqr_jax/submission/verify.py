"""`python -m spqr_jax.report verify DIR`: whether a submission is what it says, from its own records.

Form comes first (`bundle.read`): nothing else is looked at in a bundle that is refused there. Then every part is
compared with what the others say it must be, from the config down to the last digit of the leaderboard.
docs/submissions.md says what cannot be found this way.
"""

import json
import os
from typing import Any, NamedTuple

from spqr_jax.score.row import GAIN_FIGURES
from spqr_jax.submission import bundle as bundle_lib
from spqr_jax.submission import division, images, places, scores, stated
from spqr_jax.submission.bundle import Bundle
from spqr_jax.submission.places import Refused, shown
from spqr_jax.submission.scores import Difference


class Verification(NamedTuple):
    """The outcome of a verification.

    Attributes:
        id: of the submission; "" where it could not be read.
        faults: everything that is wrong, a line each; empty for a submission that is verified.
        division: "closed", "open", or "" where there are faults.
        reasons: what keeps it out of the closed division.
        remarks: what was not checked, and why.
    """

    id: str
    faults: list[str]
    division: str = ""
    reasons: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def verified(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults

    def as_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        return {"verified": self.verified} | self._asdict()


def check(directory: str | os.PathLike[str], *, id: str = "", pins: division.Pins | None = None) -> Verification:
    """Verify the submission in a directory. Nothing is written there, and no device is used.

    id: the id that the submission was published under, or its beginning, if it is known from elsewhere. pins: what the
    closed division requires, default that of this package. Raises ValueError for an id of less than 12 digits.
    """
    if id and len(id) < 12:
        raise ValueError(f"--id {id}: expected at least 12 digits of the id.")
    try:
        bundle = bundle_lib.read(directory)
    except Refused as refused:
        return Verification("", refused.faults)
    faults = [f"{places.INDEX}: id {bundle.id[:12]}, expected {id[:12]}"] if not bundle.id.startswith(id) else []
    faults += faults_of(bundle)
    differ = [] if faults else _scores_differ(bundle)
    faults += [f"{places.LEADERBOARD}: {d.line}" for d in differ if not d.tolerated]
    if faults:
        return Verification(bundle.id, faults)
    remarks = stated.remarks(bundle)
    if scores.lacks_later_figures(bundle.leaderboard):
        remarks.append(f"{', '.join(GAIN_FIGURES)}: the leaderboard is older than these figures")
    remarks += [f"the sixth digit of a figure from features: {d.line}" for d in differ]
    reasons = division.reasons(bundle, division.shipped() if pins is None else pins)
    return Verification(bundle.id, [], "open" if reasons else "closed", tuple(reasons), tuple(remarks))


def faults_of(bundle: Bundle) -> list[str]:
    """What is wrong in a bundle that was read, apart from its scores: the config first, then cells, prompts, images."""
    faults = stated.manifest_faults(bundle.manifest)  # all else is compared with what the config says
    return faults or [*stated.faults(bundle), *images.faults(bundle)]


def _scores_differ(bundle: Bundle) -> list[Difference]:
    try:
        return scores.differences(bundle.leaderboard, scores.recomputed(bundle))
    except (ValueError, OSError) as error:
        return [Difference(f"cannot be computed from the records: {shown(str(error))}")]


def text(found: Verification) -> str:
    """A verification as the command prints it: a line a fault, or the division and what it rests on."""
    if not found.verified:
        return "\n".join([*found.faults, f"not verified: {len(found.faults)} faults"])
    lines = [f"verified: submission {found.id}", f"division: {found.division}"]
    lines += [f"  open because {reason}" for reason in found.reasons]
    return "\n".join([*lines, *(f"not checked: {remark}" for remark in found.remarks)])


def as_json(found: Verification) -> str:
    """A verification as one JSON object."""
    return json.dumps(found.as_dict(), indent=1, ensure_ascii=False)
