"""Whether submissions compare with the same reference images.

The features of these images were computed on the machine of each submission, and two machines round differently. So
they are compared as numbers, and not by their hashes. Who brings other features under the same name, to look closer to
them, gets a table apart.
"""

from collections.abc import Sequence

import numpy as np

from spqr_jax.board.submissions import Submission
from spqr_jax.submission import bundle as bundle_lib
from spqr_jax.submission import evidence, places
from spqr_jax.submission.bundle import Arrays

TOLERANCE = 1e-3  # of the largest standard deviation of a feature; rounding is a thousand times less


def groups(submissions: Sequence[Submission]) -> dict[str, str]:
    """Digest of each submission's reference -> the digest that stands for all that agree with it.

    Read again from the bundles, where there is more than one: the matrices are too large to be kept for each.
    """
    digests = sorted({submission.reference for submission in submissions})
    by_digest = {submission.reference: submission for submission in reversed(submissions)}
    firsts: dict[str, Arrays] = {}
    found: dict[str, str] = {}
    for digest in digests:
        if len(digests) == 1:
            return {digest: digest}
        arrays = _arrays(by_digest[digest])
        found[digest] = next((first for first, other in firsts.items() if agree(arrays, other)), digest)
        firsts.setdefault(found[digest], arrays)
    return found


def agree(one: Arrays, other: Arrays) -> bool:
    """Whether mean and covariance of the features are the same but for rounding."""
    if one["mu"].shape != other["mu"].shape:
        return False
    variance = float(np.diag(other["sigma"]).max())
    mean = float(np.abs(one["mu"] - other["mu"]).max())
    return (
        mean <= TOLERANCE * variance**0.5 and float(np.abs(one["sigma"] - other["sigma"]).max()) <= TOLERANCE * variance
    )


def _arrays(submission: Submission) -> Arrays:
    """Raises Refused for a bundle that was changed since it was verified."""
    name = places.REFERENCE
    entry = places.Entry(**submission.files[name])
    return evidence.arrays(places.content(submission.directory, name, entry), bundle_lib.REFERENCE, name)
