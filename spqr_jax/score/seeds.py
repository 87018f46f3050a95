"""The part of an interval that fine-tuning seeds add, where a row has several. NumPy only.

Prompts are resampled, so their replicates hold the variation between prompts. Another seed would move every prompt
together, and no resampling of prompts shows that. From k seeds the variation is estimated with k - 1 degrees of freedom
only. So every replicate also gets a deviation: a random contrast of the k estimates, one per seed, spread like
Student's t with k - 1 degrees of freedom, times the standard error of their mean. The contrast belongs to the row and
the replicate. Figures of one row (h, R, SPQR, FID, the steps of a drift curve) so deviate together, as their estimates
do, and different rows deviate independently.

The estimates of the seeds also differ by chance, because each seed draws its own images: the interaction of prompts and
seeds. The replicates of the prompts hold this noise already, so it is taken out of the deviations: its median, by which
half of all rows get no deviation where the seeds do not differ. Its mean is larger and would leave too little in most
rows of few seeds. benchmarks/coverage.py measures how often such intervals hold the true drift: 95 to 97% with three to
five seeds. With two it is 92 to 98%: one degree of freedom says too little. With one seed nothing is added.
The letters: B replicates, n prompts, k seeds.
"""

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from spqr_jax.score.stats import Array, Draws, Totals

STEPS = 121  # of the grid over a variance that is not known: its error is below 1e-6 of the p value


class SeedSpread(NamedTuple):
    """One figure of one row, seed by seed, in the figure's unit."""

    values: Array  # [k]
    noise: float  # variance of one seed's value that prompts explain: the interaction, divided by the prompts

    @property
    def sd(self) -> float:
        """Estimated standard deviation between seeds, without the noise; 0 where the seeds do not differ more."""
        return math.sqrt(max(0.0, float(np.var(self.values, ddof=1)) - self.noise))

    @property
    def error(self) -> float:
        """Standard error of the mean of the values as far as their spread shows it, noise included."""
        return float(np.std(self.values, ddof=1)) / math.sqrt(len(self.values))


def spread(seeds: Sequence[Totals], values: Sequence[float] | None = None) -> SeedSpread | None:
    """Spread of a figure between seeds, from its totals over the same n prompts; None for fewer than two seeds.

    values: the figure by seed, where it is not the mean of the totals: then these are totals of influences on it.
    A seed without any value is left out.
    """
    known = [i for i, totals in enumerate(seeds) if totals.counts.any()]
    if len(known) < 2:
        return None
    found = np.array([seeds[i].mean if values is None else values[i] for i in known])
    n = len(seeds[0].sums)
    # How much each prompt moves the mean of each seed: [n, k], every column with mean zero.
    moves = np.stack([(t.sums - t.mean * t.counts) * n / t.counts.sum() for t in (seeds[i] for i in known)], axis=1)
    interaction = moves - moves.mean(axis=1, keepdims=True)
    return SeedSpread(found, float(np.sum(interaction**2)) / (max(n - 1, 1) * (len(known) - 1)) / n)


def deviations(figure: SeedSpread | None, draws: Draws, row: str) -> Array | None:
    """What the seeds add to the replicates [B] of a figure, in its unit; None for fewer than two seeds.

    row: a stable name of the row, from which with the draws' seed the contrasts are drawn.
    """
    if figure is None:
        return None
    centred = figure.values - figure.values.mean()
    variance = float(np.var(figure.values, ddof=1))
    # The median of chi squared over its k - 1 degrees of freedom (Wilson and Hilferty, 1931).
    median = (1.0 - 2.0 / (9.0 * (len(centred) - 1))) ** 3
    kept = max(0.0, 1.0 - median * figure.noise / variance) if variance > 0.0 else 0.0
    return math.sqrt(kept) * (contrasts(len(centred), draws, row) @ centred)


@lru_cache(maxsize=8)
def contrasts(seeds: int, draws: Draws, row: str) -> Array:
    """Random contrasts of k seeds, float64 [B, k], rows sum to zero. Same arguments, same draw.

    A contrast times k values is distributed like Student's t with k - 1 degrees of freedom times the standard error of
    their mean.
    """
    if seeds < 2:
        raise ValueError(f"seeds must be at least 2 to see how they differ, found {seeds}")
    word = int.from_bytes(hashlib.sha256(row.encode()).digest()[:8], "big")
    rng = np.random.default_rng((draws.seed, seeds, word))
    normal = rng.normal(size=(draws.replicates, seeds))
    scale = np.sqrt(seeds * rng.chisquare(seeds - 1, size=draws.replicates))
    result = (normal - normal.mean(axis=1, keepdims=True)) / scale[:, None]
    result.setflags(write=False)
    return result


def difference_test(differences: Array, sides: Sequence[SeedSpread | None]) -> float:
    """Two-sided p value, in [0, 1], of the mean of paired differences [n] of prompts; seeds count as drawn at random.

    differences: one side minus the other, each the mean over its seeds. sides: the spread between the seeds of each
    side, None where a side has one seed: its variation cannot be seen, and the test is about this seed's model.
    The mean is normal by the prompts, and each side adds Student's t by its seeds: the test of Behrens and Fisher. The
    spread enters with its noise, which the prompts hold as well: the test errs on the cautious side. With two seeds a
    side, t has one degree of freedom, and hardly any difference gives a p value below 0.001.
    """
    mean, n = abs(float(differences.mean())), len(differences)
    known = [side for side in sides if side is not None]
    if n < 2 or mean == 0.0:
        return 1.0
    # Given the variances, the mean is normal. They are averaged over their distributions on a grid.
    variance, weight = np.array([float(np.var(differences, ddof=1)) / n]), np.ones(1)
    for side in known:
        drawn, share = _variances(len(side.values) - 1)
        variance = (variance[:, None] + side.error**2 * drawn).ravel()
        weight = (weight[:, None] * share).ravel()
    tails = [math.erfc(mean / math.sqrt(2.0 * v)) if v > 0.0 else 0.0 for v in variance.tolist()]
    return min(1.0, float(weight @ np.array(tails)))


@lru_cache(maxsize=8)
def _variances(freedom: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Variances freedom / chi squared, and their shares, on a grid that is even in the logarithm."""
    logarithm = np.linspace(-60.0 / freedom, math.log(freedom + 60.0), STEPS)
    density = 0.5 * freedom * logarithm - 0.5 * np.exp(logarithm)
    share = np.exp(density - density.max())
    return freedom * np.exp(-logarithm), share / share.sum()
