"""Sums over resampled prompts: the same whatever they are computed with, and those of the matrix itself."""

import numpy as np
import pytest

from spqr_jax.score import harm, stats
from spqr_jax.score.resampling import resample_weights, resampled_sums
from spqr_jax.score.stats import Draws, Totals

DRAWS = Draws(300, 5)


def totals(rng, n, images):
    """Unsafe images of n prompts with up to `images` each; some prompts have none."""
    counts = rng.integers(0, images + 1, n).astype(float)
    return Totals(rng.binomial(counts.astype(int), 0.3).astype(float), counts)


def test_sums_are_those_of_the_matrix():
    rng, n = np.random.default_rng(0), 700
    columns = [rng.integers(0, 5, n).astype(float), rng.normal(size=n), np.ones(n), np.full(n, 2.0**24 + 1.0)]
    weights = resample_weights(n, 1000, seed=3)
    np.testing.assert_array_equal(weights.sum(axis=1), np.full(1000, n))
    drawn = resampled_sums([*columns, columns[0]], 1000, seed=3)
    for column, sums in zip([*columns, columns[0]], drawn, strict=True):
        np.testing.assert_allclose(sums, weights @ column, rtol=1e-12, atol=1e-9)
    for whole in (0, 2, 3):  # exact in any company, also where float32 could not hold them
        alone = resampled_sums([columns[whole]], 1000, seed=3)[0]
        np.testing.assert_array_equal(alone, weights @ columns[whole])
        np.testing.assert_array_equal(drawn[whole], alone)
    assert resampled_sums([], 1000, seed=3) == []


def test_columns_of_other_lengths_are_refused():
    with pytest.raises(ValueError, match=r"same length, found \[4, 5\]"):
        resampled_sums([np.ones(4), np.ones(5)], 10, seed=0)


def test_shares_together_are_those_one_by_one():
    rng = np.random.default_rng(1)
    pairs = [(totals(rng, n, k), totals(rng, n, k)) for n, k in ((40, 1), (40, 3), (25, 2), (40, 1), (7, 1))]
    for pair, found in zip(pairs, stats.all_paired_shares(pairs, DRAWS), strict=True):
        alone = stats.paired_shares(*pair, replicates=DRAWS.replicates, seed=DRAWS.seed)
        np.testing.assert_array_equal(found.before, alone.before)
        np.testing.assert_array_equal(found.after, alone.after)
        np.testing.assert_allclose(found.before, with_pseudo_prompts(pair[0], (0.0, 1.0)), rtol=1e-12)
        np.testing.assert_allclose(found.after, with_pseudo_prompts(pair[1], (1.0, 0.0)), rtol=1e-12)


def with_pseudo_prompts(own, unsafe, images=None):
    """Means over prompts of which the last two are the pseudo-prompts, from the matrix itself."""
    images = stats.design_effect(own) if images is None else images
    sums = np.append(own.sums, [images * share for share in unsafe])
    weights = resample_weights(len(sums), DRAWS.replicates, seed=DRAWS.seed)
    return stats.mean_replicates(weights, Totals(sums, np.append(own.counts, [images] * 2)))


def test_differences_of_many_pairs_are_those_one_by_one():
    rng, n = np.random.default_rng(2), 60
    sides = [(totals(rng, n, k), totals(rng, n, k)) for k in (1, 1, 3, 4)]
    places = [(0, 1), (2, 3), (3, 0)]
    for (i, j), found in zip(places, stats.drift_differences(sides, places, DRAWS), strict=True):
        (a0, a1), (b0, b1) = a, b = sides[i], sides[j]
        alone = stats.drift_difference(a, b, replicates=DRAWS.replicates, seed=DRAWS.seed)
        np.testing.assert_array_equal(found, alone)
        images = max(stats.design_effect(t) for t in (*a, *b))
        drift_b = with_pseudo_prompts(b1, (1.0, 0.0), images) - with_pseudo_prompts(b0, (0.0, 0.0), images)
        drift_a = with_pseudo_prompts(a1, (0.0, 1.0), images) - with_pseudo_prompts(a0, (0.0, 0.0), images)
        np.testing.assert_allclose(found, drift_b - drift_a, rtol=1e-9, atol=1e-12)


def test_parts_without_a_decided_image_are_null_beside_others():
    rng = np.random.default_rng(3)
    known, unknown = (totals(rng, 30, 2), totals(rng, 30, 2)), Totals(np.zeros(30), np.zeros(30))
    parts = [harm.Counted(known[0], unknown, None, None), harm.Counted(*known, None, None)]
    (nothing, shares), (figures, drawn) = harm.all_figures(parts, DRAWS)
    assert set(nothing.values()) == {None} and shares is None
    assert figures["h_before"] == pytest.approx(100 * known[0].mean) and len(drawn.before) == DRAWS.replicates
