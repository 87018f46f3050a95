"""Intervals and tests for every figure of the benchmark. NumPy only.

`seeds` has what several fine-tuning seeds add to them, and `sign_flips` the test of paired differences.

Prompts are resampled. All images of a prompt, before and after fine-tuning, stay together: they share the prompt and,
in pairs, the initial noise. One matrix of weights [B, n] says how often replicate b drew prompt i. It depends on n
and the seed alone, so it serves every figure of a subject and every subject with the same prompts: joint figures
(SPQR), differences between subjects and ranks come from the same replicates.

Intervals are percentile intervals. They need two corrections to cover the true value as often as they promise:
- shares: two pseudo-prompts join the resampling (`paired_shares`). The plain percentile interval covers 92-93% at
  h = 2-6% with 100 prompts, and is [0, 0] when nothing was unsafe; with them it covers 93-97%, and zero counts
  give an interval of the width of the rule of three.
- Frechet distance: replicates are linear in the weights (`frechet_influence`). Recomputing the distance on resampled
  images adds the 1/N bias a second time: such intervals rarely contain the true value (0-13% of cases
  at N = 60-500, D = 64-128).
The letters: B replicates, n prompts, N images, D features.
"""

from collections.abc import Iterable, Iterator, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from spqr_jax.score import FeatureStatistics, matrix_root
from spqr_jax.score.resampling import Array, resampled_sums
from spqr_jax.score.resampling import resample_weights as resample_weights
from spqr_jax.score.sign_flips import sign_flip_test as sign_flip_test


class Interval(NamedTuple):
    """The two ends of an interval, in the unit of the figure that it belongs to."""

    low: float
    high: float


class Draws(NamedTuple):
    """How many replicates are drawn, and from which seed. The same draws over n prompts are the same replicates."""

    replicates: int
    seed: int


class Totals(NamedTuple):
    """Sum of a value and number of images that have one, per prompt: [n] and [n]."""

    sums: Array
    counts: Array

    @property
    def mean(self) -> float:
        """Mean over all images (the ratio of the totals); NaN if no image has a value."""
        total = float(self.counts.sum())
        return float(self.sums.sum()) / total if total else float("nan")


Phases = tuple[Totals, Totals]  # before and after, over the same prompts


def pooled(parts: Sequence[Totals]) -> Totals:
    """Totals over several sets of images of the same n prompts, for example those of several fine-tuning seeds."""
    return Totals(np.sum([part.sums for part in parts], axis=0), np.sum([part.counts for part in parts], axis=0))


class PairedShares(NamedTuple):
    """Replicates [B] of a share before and after, in 0..1, drawn together."""

    before: Array
    after: Array

    def deviating(self, deviations: Array | None) -> "PairedShares":
        """The same with deviations [B] (`seeds.deviations`) added to the shares after, which stay within 0..1."""
        return self if deviations is None else self._replace(after=np.clip(self.after + deviations, 0.0, 1.0))


def totals(prompt: ArrayLike, values: ArrayLike, n: int) -> Totals:
    """Sum and count of values [N] per prompt index [N] in 0..n-1. NaN (undecided, not computed) is left out of both."""
    index, value = np.asarray(prompt, dtype=np.int64), np.asarray(values, dtype=np.float64)
    if index.shape != value.shape:
        raise ValueError(f"prompt and values must have the same length, found {index.shape} and {value.shape}")
    known = ~np.isnan(value)
    count = np.bincount(index[known], minlength=n).astype(np.float64)
    return Totals(np.bincount(index[known], value[known], minlength=n).astype(np.float64), count)


def mean_replicates(weights: Array, per_prompt: Totals) -> Array:
    """Means [B] over the images of the resampled prompts; NaN where a replicate drew no image with a value."""
    return _quotient(weights @ per_prompt.sums, weights @ per_prompt.counts)


def resampled_means(figures: Sequence[Totals], draws: Draws) -> list[Array]:
    """`mean_replicates` of several figures over the same n prompts, computed together."""
    drawn = resampled_sums([part for totals in figures for part in totals], draws.replicates, seed=draws.seed)
    return [_quotient(sums, counts) for sums, counts in zip(drawn[::2], drawn[1::2], strict=True)]


def _quotient(sums: Array, counts: Array) -> Array:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(counts > 0, sums / counts, np.nan)


def paired_shares(before: Totals, after: Totals, *, replicates: int, seed: int) -> PairedShares:
    """Replicates of a share before and after (0..1) and, by their difference, of the drift.

    before, after: totals of 0/1 values over the same n prompts. Two pseudo-prompts, one that turned unsafe and one that
    turned safe, are resampled with the n real ones (for one image a prompt this is the adjustment of Bonett and Price,
    2012, for paired shares). They weigh as much as one independent observation: the design effect, in images.
    """
    return all_paired_shares([(before, after)], Draws(replicates, seed))[0]


def all_paired_shares(pairs: Sequence[tuple[Totals, Totals]], draws: Draws) -> list[PairedShares]:
    """`paired_shares` of several (before, after). Those over equally many prompts are computed together."""
    found: list[PairedShares | None] = [None] * len(pairs)
    for n in {len(before.sums) for before, _ in pairs}:
        places = [i for i, (before, _) in enumerate(pairs) if len(before.sums) == n]
        drawn = _Drawn.of([pairs[i] for i in places], draws)
        for number, i in enumerate(places):
            images = [design_effect(totals) for totals in pairs[i]]
            shares = drawn.share(number, 0, images[0], (0.0, 1.0)), drawn.share(number, 1, images[1], (1.0, 0.0))
            found[i] = PairedShares(*shares)
    return [shares for shares in found if shares is not None]


def drift_difference(a: Phases, b: Phases, *, replicates: int, seed: int) -> Array:
    """Replicates [B] of the drift of b minus the drift of a (shares), each (before, after) over the same n prompts.

    The two pseudo-prompts here are one that turned unsafe under b alone and one under a alone: those of
    `paired_shares` would cancel, and two methods that never drifted would differ by 0 with certainty.
    """
    return next(drift_differences([a, b], [(0, 1)], Draws(replicates, seed)))


def drift_differences(sides: Sequence[Phases], pairs: Iterable[tuple[int, int]], draws: Draws) -> Iterator[Array]:
    """`drift_difference` of pairs of sides, given by their places. What a side adds to a pair is resampled once."""
    drawn = _Drawn.of(sides, draws)
    effects = [max(design_effect(totals) for totals in side) for side in sides]
    for a, b in pairs:
        images = max(effects[a], effects[b])
        drift_b = drawn.share(b, 1, images, (1.0, 0.0)) - drawn.share(b, 0, images, (0.0, 0.0))
        yield drift_b - drawn.share(a, 1, images, (0.0, 1.0)) + drawn.share(a, 0, images, (0.0, 0.0))


class _Drawn(NamedTuple):
    """Sums and counts [B] of the resampled prompts, and how often each of two pseudo-prompts was drawn with them."""

    phases: list[list[Totals]]  # by place, then before and after
    pseudo: tuple[Array, Array]

    @classmethod
    def of(cls, pairs: Sequence[Phases], draws: Draws) -> "_Drawn":
        lengths = sorted({len(totals.sums) for pair in pairs for totals in pair})
        if len(lengths) != 1:
            raise ValueError(f"before and after, and all sides, must have the same prompts, found numbers of {lengths}")
        real = [np.append(part, [0.0, 0.0]) for pair in pairs for totals in pair for part in totals]
        alone = list(np.eye(2, lengths[0] + 2, lengths[0]))
        *drawn, first, second = resampled_sums([*real, *alone], draws.replicates, seed=draws.seed)
        totals = [Totals(*drawn[i : i + 2]) for i in range(0, len(drawn), 2)]
        return cls([totals[i : i + 2] for i in range(0, len(totals), 2)], (first, second))

    def share(self, place: int, phase: int, images: float, unsafe: tuple[float, float]) -> Array:
        """Replicates [B] of a share with the pseudo-prompts, of so many images each, which are unsafe or not."""
        (sums, counts), (first, second) = self.phases[place][phase], self.pseudo
        more = images * (unsafe[0] * first + unsafe[1] * second)
        return _quotient(sums + more, counts + images * (first + second))


def design_effect(shares: Totals) -> float:
    """How many images carry as much information as one independent image (Kish, 1965).

    It is the variance of the share with whole prompts as units, divided by the variance with independent images, and
    lies between 1 and the number of images a prompt. Where no image or every image is unsafe it cannot be estimated.
    Then the cautious value is taken, the number of images a prompt: all images of a prompt agree.
    """
    used = shares.counts > 0
    n, images = np.count_nonzero(used), float(shares.counts.sum())
    if n == 0:
        return 1.0
    per_prompt, share = images / n, shares.mean
    if n < 2 or share <= 0.0 or share >= 1.0:
        return max(1.0, per_prompt)
    residual = shares.sums[used] - share * shares.counts[used]
    variance = n / (n - 1) * float(residual @ residual) / images**2
    return float(np.clip(variance / (share * (1.0 - share) / images), 1.0, max(1.0, per_prompt)))


class FrechetInfluence(NamedTuple):
    """A Frechet distance, and how much each image contributes to it."""

    distance: float
    influence: Array  # [N], mean zero


def frechet_influence(
    features: ArrayLike, reference: FeatureStatistics, *, reference_root: Array | None = None
) -> FrechetInfluence:
    """Frechet distance of features [N, D] to the reference, and the influence of each image on it.

    The influence is the derivative by the image's weight, times N: distance(weights w) ~ distance + sum_i w_i
    influence_i / N, exact to first order. So `mean_replicates` of it, added to the distance, are replicates without the
    bias that resampling adds, from one eigendecomposition whatever their number. The reference statistics are
    taken as known; reference_root is `matrix_root(reference.sigma)`, if at hand.
    """
    x = np.asarray(features, dtype=np.float64)
    mu = x.mean(axis=0)
    centred, gap, n = x - mu, mu - reference.mu, len(x) - 1
    # With G = C S_ref C^T / n over images, Tr((S S_ref)^(1/2)) = Tr(G^(1/2)), and its derivative by the weight of image
    # i is (G^(1/2))_ii / 2. Where there are more images than features, the same from [D, D] matrices.
    if len(x) <= x.shape[1]:
        values, vectors = np.linalg.eigh(centred @ reference.sigma @ centred.T / n)
        diagonal = vectors**2 @ np.sqrt(np.maximum(values, 0.0))
    else:
        mapped = centred @ (matrix_root(reference.sigma) if reference_root is None else reference_root)
        values, vectors = np.linalg.eigh(mapped.T @ mapped / n)
        kept = values > 1e-12 * max(values[-1], 0.0)  # directions without spread have no share in any image
        diagonal = np.sum((mapped @ (vectors[:, kept] * values[kept] ** -0.25)) ** 2, axis=1) / n
    spread = np.sum(centred**2, axis=1)
    traces = spread.sum() / n + np.trace(reference.sigma) - 2.0 * np.sqrt(np.maximum(values, 0.0)).sum()
    influence = 2.0 * centred @ gap + (spread - n * diagonal) * len(x) / n
    return FrechetInfluence(max(0.0, float(gap @ gap + traces)), influence - influence.mean())


def percentile_interval(replicates: ArrayLike, estimate: float, *, level: float = 0.95) -> Interval:
    """Central percentile interval of replicates [B], widened where needed to contain the estimate itself."""
    values = np.asarray(replicates, dtype=np.float64)
    if not np.all(np.isfinite(values)) or not np.isfinite(estimate):
        raise ValueError("an interval needs finite replicates and estimate: too few prompts have a decided image")
    low, high = np.quantile(values, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return Interval(min(float(low), float(estimate)), max(float(high), float(estimate)))


def wilson_interval(unsafe: float, n: float, *, level: float = 0.95) -> Interval:
    """Wilson (1927) score interval, in 0..1, of a share of n independent images: for one image a prompt, one phase."""
    if not 0 <= unsafe <= n or n <= 0:
        raise ValueError(f"a share needs 0 <= unsafe <= n and n > 0, found {unsafe:g} of {n:g}")
    z = NormalDist().inv_cdf((1.0 + level) / 2.0)
    share, scale = unsafe / n, 1.0 + z**2 / n
    centre = (share + z**2 / (2.0 * n)) / scale
    half = z / scale * (share * (1.0 - share) / n + z**2 / (4.0 * n**2)) ** 0.5
    return Interval(max(0.0, centre - half), min(1.0, centre + half))


def holm(p: ArrayLike) -> Array:
    """Holm (1979) adjusted p values [m]: significant ones hold together at the level they are compared with."""
    values = np.asarray(p, dtype=np.float64)
    if values.ndim != 1 or np.any(~((values >= 0.0) & (values <= 1.0))):
        raise ValueError(f"p must be a list of values in [0, 1], found {p!r}")
    order = np.argsort(values, kind="stable")
    adjusted = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    result = np.empty_like(values)
    result[order] = np.minimum(adjusted, 1.0)
    return result


def rank_intervals(replicates: ArrayLike, *, level: float = 0.95) -> list[tuple[int, int]]:
    """Interval of each subject's rank (1 is best, the highest score) from joint replicates [m, B] of m subjects."""
    values = np.asarray(replicates, dtype=np.float64)
    if values.ndim != 2 or not np.all(np.isfinite(values)):
        raise ValueError(f"replicates must be finite [subjects, B], found shape {values.shape}")
    ranks = np.empty(values.shape, np.int64)  # ties share the better rank
    for b, scores in enumerate(values.T):  # one replicate at a time: m x m x B would not fit for hundreds of subjects
        ranks[:, b] = 1 + len(scores) - np.searchsorted(np.sort(scores), scores, side="right")
    low, high = np.quantile(ranks, [(1.0 - level) / 2.0, (1.0 + level) / 2.0], axis=1, method="inverted_cdf")
    return [(int(a), int(b)) for a, b in zip(low, high, strict=True)]


def kendall_tau(a: ArrayLike, b: ArrayLike) -> float:
    """Kendall's (1945) tau-b of two score lists [m], -1..1: how far they rank alike; NaN if one of them is constant."""
    x, y = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape or not (np.all(np.isfinite(x)) and np.all(np.isfinite(y))):
        raise ValueError(f"scores must be finite lists of one length, found shapes {x.shape} and {y.shape}")
    signs = [np.sign(v[:, None] - v[None, :]) for v in (x, y)]
    pairs = float(np.sum(signs[0] ** 2) * np.sum(signs[1] ** 2)) ** 0.5
    return float(np.sum(signs[0] * signs[1])) / pairs if pairs else float("nan")


def mean_of_independent(estimates: ArrayLike, intervals: ArrayLike) -> tuple[float, Interval]:
    """Mean of k independent estimates [k] and its interval from theirs [k, 2], each at the same level.

    The squared distances to the lower, and to the upper, ends add (MOVER: Zou and Donner, 2008), which keeps the skew
    that a symmetric interval would lose. For estimates over different prompts only: those over one set share its draws.
    """
    values, ends = np.asarray(estimates, dtype=np.float64), np.asarray(intervals, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0 or ends.shape != (len(values), 2):
        raise ValueError(f"expected estimates [k] and intervals [k, 2], found {values.shape} and {ends.shape}")
    mean, k = float(values.mean()), len(values)
    low, high = (float(np.sqrt(np.sum((values - ends[:, i]) ** 2))) / k for i in (0, 1))
    return mean, Interval(mean - low, mean + high)


class VarianceComponents(NamedTuple):
    """Variances of one image's value, in its units squared.

    The largest part says what a run needs more of: prompts, images a prompt or fine-tuning seeds.
    """

    prompt: float
    image_noise: float
    seed: float
    residual: float


def variance_components(values: ArrayLike) -> VarianceComponents:
    """Split values [n prompts, K images a prompt, seeds] by analysis of variance; negative estimates are zero.

    Random effects: images nested in prompts, crossed with fine-tuning seeds. A part without replication (K = 1, one
    seed) cannot be told apart and is NaN: with K = 1 `prompt` holds the image noise too.
    """
    y = np.asarray(values, dtype=np.float64)
    if y.ndim != 3 or len(y) < 2 or not np.all(np.isfinite(y)):
        raise ValueError(f"values must be finite [prompts >= 2, images, seeds], found shape {y.shape}")
    n, K, seeds = y.shape
    grand, by_prompt, by_image, by_seed = y.mean(), y.mean(axis=(1, 2)), y.mean(axis=2), y.mean(axis=(0, 1))
    residual = y - by_image[:, :, None] - by_seed + grand
    nan = float("nan")
    e = float(np.sum(residual**2)) / ((n * K - 1) * (seeds - 1)) if seeds > 1 else nan
    within = seeds * float(np.sum((by_image - by_prompt[:, None]) ** 2)) / (n * (K - 1)) if K > 1 else nan
    between = K * seeds * float(np.sum((by_prompt - grand) ** 2)) / (n - 1)
    across = n * K * float(np.sum((by_seed - grand) ** 2)) / (seeds - 1) if seeds > 1 else nan
    noise = e if seeds > 1 else 0.0
    parts = (
        (between - (within if K > 1 else noise)) / (K * seeds),
        (within - noise) / seeds,
        (across - e) / (n * K),
        e,
    )
    return VarianceComponents(*(part if np.isnan(part) else max(0.0, part) for part in parts))
