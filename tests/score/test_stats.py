"""Coverage by simulation, closed forms, and exhaustive references of the intervals and tests."""

import math
import time
from itertools import product
from statistics import NormalDist

import numpy as np
import pytest

from spqr_jax import score
from spqr_jax.score import stats

BENCHMARKS = 1000


def benchmark(rng, n, K, h_before, h_after, *, agreement=0.4, pairing=0.8):
    """Verdicts [n, K] before and after of one simulated benchmark whose true shares are h_before and h_after.

    An image is unsafe if a normal variable is below a threshold; images of a prompt correlate by `agreement`, and an
    image with itself after fine-tuning by `pairing`: the design that the bootstrap over prompts has to respect.
    """

    def normal():
        return agreement**0.5 * rng.normal(size=(n, 1)) + (1 - agreement) ** 0.5 * rng.normal(size=(n, K))

    before = normal()
    after = pairing * before + (1 - pairing**2) ** 0.5 * normal()
    inverse = NormalDist().inv_cdf
    return before < inverse(h_before), after < inverse(h_after)


SLOW = pytest.param(500, 1, 0.06, 0.01, marks=pytest.mark.slow)


@pytest.mark.parametrize(("n", "K", "h", "drift"), [(100, 4, 0.06, 0.03), SLOW, (60, 4, 0.2, 0.2)])
def test_intervals_cover_the_truth_as_often_as_they_say(n, K, h, drift):
    """95% intervals of S, dh, R, P and SPQR hold the true value in 93-97% of 1,000 simulated benchmarks."""
    rng, images, m = np.random.default_rng(1), np.repeat(np.arange(n), K), 100
    P, Q, R = 0.29, 0.8, score.robustness(100 * drift)
    truth = {"S": 1 - h, "dh": 100 * drift, "R": R, "P": P, "SPQR": score.spqr(1 - h, P, Q, R)}
    hits = dict.fromkeys(truth, 0)
    for _ in range(BENCHMARKS):
        before, after = (stats.totals(images, x.ravel(), n) for x in benchmark(rng, n, K, h, h + drift))
        clip = stats.totals(np.arange(m), P + 0.04 * rng.normal(size=m), m)
        shares = stats.paired_shares(before, after, replicates=1000, seed=0)
        drawn_P = stats.mean_replicates(stats.resample_weights(m, 1000, seed=0), clip)
        drawn_dh, dh = 100 * (shares.after - shares.before), 100 * (after.mean - before.mean)
        drawn_R, R = score.robustness(drawn_dh), score.robustness(dh)
        figures = {
            "S": (1 - shares.before, 1 - before.mean),
            "dh": (drawn_dh, dh),
            "R": (drawn_R, R),
            "P": (drawn_P, clip.mean),
            "SPQR": (
                score.spqr(1 - shares.before, drawn_P, Q, drawn_R),
                score.spqr(1 - before.mean, clip.mean, Q, R),
            ),
        }
        for figure, (drawn, estimate) in figures.items():
            low, high = stats.percentile_interval(drawn, estimate)
            hits[figure] += low - 1e-9 <= truth[figure] <= high + 1e-9
    assert all(0.93 <= count / BENCHMARKS <= 0.97 for count in hits.values()), hits


def test_intervals_of_the_difference_of_two_drifts_cover_the_truth():
    rng, n, K, hits = np.random.default_rng(4), 80, 2, 0
    images = np.repeat(np.arange(n), K)
    for _ in range(BENCHMARKS):
        a, b = (
            tuple(stats.totals(images, x.ravel(), n) for x in benchmark(rng, n, K, h, h + drift))
            for h, drift in ((0.06, 0.02), (0.1, 0.1))
        )
        drawn = stats.drift_difference(a, b, replicates=600, seed=0)
        low, high = stats.percentile_interval(drawn, (b[1].mean - b[0].mean) - (a[1].mean - a[0].mean))
        hits += low <= 0.08 <= high
    assert 0.93 <= hits / BENCHMARKS <= 0.97


def test_two_methods_that_never_drifted_may_still_differ():
    t = stats.totals(np.arange(40), np.zeros(40), 40)
    low, high = stats.percentile_interval(stats.drift_difference((t, t), (t, t), replicates=2000, seed=0), 0.0)
    assert -0.12 < low < -0.03 and 0.03 < high < 0.12
    with pytest.raises(ValueError, match="same prompts"):
        short = stats.totals([0, 1], [1.0, 0.0], 2)
        stats.drift_difference((t, t), (short, t), replicates=9, seed=0)


def frechet_by_resampling(x, reference, weights):
    """The plain bootstrap: the distance recomputed on every resample."""
    result = []
    for w in weights:
        drawn = np.repeat(x, w.astype(int), axis=0)
        result.append(score.frechet_distance_from_statistics(score.feature_statistics(drawn), reference))
    return np.array(result)


@pytest.mark.slow
def test_interval_of_the_frechet_distance_covers_its_expectation_and_resampling_does_not():
    rng, N, D = np.random.default_rng(2), 150, 48
    mix = rng.normal(size=(D, D)) * np.exp(-np.arange(D) / 10)
    reference = score.FeatureStatistics(np.zeros(D), mix @ mix.T + 0.01 * np.eye(D))
    weights = stats.resample_weights(N, 400, seed=0)

    def images():
        return np.maximum(rng.normal(size=(N, D)), -2) @ (1.2 * mix.T) + 0.1 * rng.normal(size=(N, D)) + 0.2

    root = score.matrix_root(reference.sigma)
    results = [stats.frechet_influence(images(), reference, reference_root=root) for _ in range(BENCHMARKS)]
    expectation = np.mean([r.distance for r in results])
    hits = 0
    for r in results:
        drawn = r.distance + stats.mean_replicates(weights, stats.totals(np.arange(N), r.influence, N))
        low, high = stats.percentile_interval(drawn, r.distance)
        hits += low <= expectation <= high
    assert 0.93 <= hits / BENCHMARKS <= 0.97
    plain = [np.quantile(frechet_by_resampling(images(), reference, weights[:40]), [0.025, 0.975]) for _ in range(20)]
    assert np.mean([low <= expectation <= high for low, high in plain]) < 0.2


@pytest.mark.parametrize(("N", "D"), [(40, 8), (20, 30)])
def test_frechet_influence_is_the_derivative_by_the_weights(N, D):
    rng = np.random.default_rng(N)
    x = rng.normal(size=(N, D))
    reference = score.feature_statistics(rng.normal(size=(200, D)) * 1.3 + 0.2)

    def distance(weights):
        mu = weights @ x / N
        sigma = ((x - mu).T * weights) @ (x - mu) / (N - 1)
        return score.frechet_distance_from_statistics(score.FeatureStatistics(mu, sigma), reference)

    direction, step = rng.normal(size=N), 1e-3
    direction -= direction.mean()
    slope = (distance(1 + step * direction) - distance(1 - step * direction)) / (2 * step)
    result = stats.frechet_influence(x, reference)
    assert direction @ result.influence / N == pytest.approx(slope, rel=1e-3)
    assert result.distance == pytest.approx(distance(np.ones(N)), rel=1e-6)
    given = stats.frechet_influence(x, reference, reference_root=score.matrix_root(reference.sigma))
    np.testing.assert_array_equal(given.influence, result.influence)


def test_frechet_replicates_are_cheap():
    rng = np.random.default_rng(0)
    x, reference = rng.normal(size=(500, 128)), score.feature_statistics(rng.normal(size=(400, 128)))
    start = time.perf_counter()
    influence = stats.frechet_influence(x, reference).influence
    stats.mean_replicates(stats.resample_weights(500, 2000, seed=0), stats.totals(np.arange(500), influence, 500))
    assert time.perf_counter() - start < 5.0  # 0.1 s alone on one core


def test_weights_are_draws_of_prompts_with_replacement():
    weights = stats.resample_weights(50, 4000, seed=3)
    assert weights.shape == (4000, 50) and weights.dtype == np.float64
    np.testing.assert_array_equal(weights.sum(axis=1), 50)
    assert weights.mean(axis=0) == pytest.approx(np.ones(50), abs=0.1)
    assert weights.var() == pytest.approx(1 - 1 / 50, abs=0.02)
    np.testing.assert_array_equal(weights, stats.resample_weights(50, 4000, seed=3))
    assert not np.array_equal(weights, stats.resample_weights(50, 4000, seed=4))


def test_all_images_of_a_prompt_stay_together():
    """K copies of one image carry the information of one: the interval must not shrink with K."""
    values = np.arange(40) < 10
    widths = []
    for K in (1, 8):
        t = stats.totals(np.repeat(np.arange(40), K), np.repeat(values, K), 40)
        shares = stats.paired_shares(t, t, replicates=2000, seed=0)
        low, high = stats.percentile_interval(shares.before, t.mean)
        widths.append(high - low)
    assert widths[0] == pytest.approx(widths[1], rel=1e-9)


def test_pairing_removes_what_before_and_after_share():
    rng = np.random.default_rng(0)
    before = rng.random(400) < 0.5
    after = before.copy()
    after[:8] = ~after[:8]
    b, a = (stats.totals(np.arange(400), x, 400) for x in (before, after))
    shares = stats.paired_shares(b, a, replicates=2000, seed=0)
    spread = np.std(shares.after - shares.before)
    assert spread < 0.5 * np.hypot(np.std(shares.after), np.std(shares.before))
    assert spread == pytest.approx(math.sqrt(10) / 402, rel=0.1)  # 8 discordant prompts and 2 pseudo-prompts


def test_an_interval_of_no_unsafe_image_is_not_a_point():
    t = stats.totals(np.arange(100), np.zeros(100), 100)
    shares = stats.paired_shares(t, t, replicates=4000, seed=0)
    low, high = stats.percentile_interval(shares.before, 0.0)
    assert low == 0.0 and 0.02 < high < 0.05  # the rule of three: 0.03
    low, high = stats.percentile_interval(shares.after - shares.before, 0.0)
    assert -0.04 < low < -0.01 and 0.01 < high < 0.04


def test_undecided_images_are_left_out_of_sum_and_count():
    t = stats.totals([0, 0, 1, 2, 2], [1.0, math.nan, 0.0, math.nan, math.nan], 4)
    np.testing.assert_array_equal(t.sums, [1, 0, 0, 0])
    np.testing.assert_array_equal(t.counts, [1, 1, 0, 0])
    assert t.mean == 0.5
    assert math.isnan(stats.totals([0], [math.nan], 1).mean)
    drawn = stats.mean_replicates(np.array([[2.0, 2.0, 0.0, 0.0], [0.0, 0.0, 2.0, 2.0]]), t)
    assert drawn[0] == 0.5 and math.isnan(drawn[1])


def test_design_effect():
    index = np.repeat(np.arange(4), 3)
    same = stats.totals(index, np.repeat([1.0, 0.0, 1.0, 0.0], 3), 4)
    assert stats.design_effect(same) == pytest.approx(3.0)  # clipped at images per prompt
    assert stats.design_effect(stats.totals(index, np.tile([1.0, 0.0, 0.0], 4), 4)) == 1.0
    assert stats.design_effect(stats.totals(index, np.zeros(12), 4)) == 3.0  # unknown: the cautious value
    assert stats.design_effect(stats.totals(index, np.full(12, math.nan), 4)) == 1.0
    rng = np.random.default_rng(0)
    independent = stats.totals(np.repeat(np.arange(2000), 4), rng.random(8000) < 0.3, 2000)
    assert stats.design_effect(independent) == pytest.approx(1.0, abs=0.1)


def test_wilson_interval():
    low, high = stats.wilson_interval(31, 500)  # h = 6.2% of 500 prompts
    assert (100 * low, 100 * high) == pytest.approx((4.4, 8.7), abs=0.05)
    assert stats.wilson_interval(0, 20).low == 0.0 and stats.wilson_interval(20, 20).high == 1.0
    for share in (low, high):  # its definition: the shares whose score test is just at the level
        z = (31 / 500 - share) / math.sqrt(share * (1 - share) / 500)
        assert abs(z) == pytest.approx(NormalDist().inv_cdf(0.975))


def test_percentile_interval():
    assert stats.percentile_interval(np.arange(1001.0), 500.0) == pytest.approx((25.0, 975.0))
    assert stats.percentile_interval(np.arange(1001.0), 500.0, level=0.5) == pytest.approx((250.0, 750.0))
    assert stats.percentile_interval(np.arange(1001.0), 990.0) == pytest.approx((25.0, 990.0))


def test_sign_flip_test_agrees_with_all_flips():
    d = np.array([3.0, -1.0, 2.0, 2.0, 0.0, 1.0, 4.0, -2.0, 1.5, 0.5])
    flips = np.array(list(product([-1, 1], repeat=len(d)))) @ d
    exact = np.mean(np.abs(flips) >= abs(d.sum()) - 1e-9)
    p = stats.sign_flip_test(np.stack([d, np.zeros(10), np.full(10, 5.0)], axis=1), replicates=20000, seed=0)
    assert p[0] == pytest.approx(exact, abs=0.01)
    assert p[1] == 1.0
    assert p[2] == pytest.approx(2 / 1024, abs=0.001)


def test_sign_flip_test_holds_its_level():
    rng = np.random.default_rng(0)
    null = rng.choice([-100.0, 0.0, 0.0, 0.0, 100.0], size=(200, 2000))
    assert 0.03 <= np.mean(stats.sign_flip_test(null, replicates=999, seed=1) <= 0.05) <= 0.06


def test_holm():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert stats.holm([]).shape == (0,)


def test_rank_intervals():
    rng = np.random.default_rng(0)
    noise = 0.01 * rng.normal(size=(4, 2000))
    scores = np.array([[0.9], [0.5], [0.5], [0.1]]) + noise
    assert stats.rank_intervals(scores) == [(1, 1), (2, 3), (2, 3), (4, 4)]
    assert stats.rank_intervals(np.ones((2, 10))) == [(1, 1), (1, 1)]


def test_variance_components_of_a_known_design():
    rng = np.random.default_rng(0)
    n, K, seeds = 300, 4, 300
    y = (
        3.0 * rng.normal(size=(n, 1, 1))
        + 2.0 * rng.normal(size=(n, K, 1))
        + 1.5 * rng.normal(size=(1, 1, seeds))
        + 1.0 * rng.normal(size=(n, K, seeds))
    )
    assert stats.variance_components(y) == pytest.approx((9.0, 4.0, 2.25, 1.0), rel=0.25)
    one_image = stats.variance_components(y[:, :1])
    assert one_image.prompt == pytest.approx(13.0, rel=0.25) and math.isnan(one_image.image_noise)
    one_seed = stats.variance_components(y[:, :, :1])
    assert one_seed.prompt == pytest.approx(9.0, rel=0.25) and math.isnan(one_seed.seed)
    assert one_seed.image_noise == pytest.approx(5.0, rel=0.25)  # holds the residual too


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stats.resample_weights(1, 10, seed=0), "at least 2 prompts, found 1"),
        (lambda: stats.resample_weights(5, 0, seed=0), "replicates must be at least 1"),
        (lambda: stats.totals([0, 1], [1.0], 2), "same length"),
        (lambda: stats.percentile_interval([1.0, math.nan], 1.0), "finite replicates"),
        (lambda: stats.percentile_interval([1.0, 2.0], math.nan), "finite replicates"),
        (lambda: stats.wilson_interval(3, 2), "found 3 of 2"),
        (lambda: stats.wilson_interval(0, 0), "n > 0"),
        (lambda: stats.sign_flip_test([math.nan], seed=0), "differences must be finite"),
        (lambda: stats.sign_flip_test([], seed=0), "n >= 1"),
        (lambda: stats.holm([0.5, 1.5]), "p must"),
        (lambda: stats.holm([math.nan]), "p must"),
        (lambda: stats.rank_intervals([[math.nan]]), "replicates must be finite"),
        (lambda: stats.variance_components(np.ones((1, 2, 2))), "prompts >= 2"),
        (
            lambda: stats.paired_shares(
                stats.totals([0], [1.0], 1), stats.totals([0, 1], [1.0, 0.0], 2), replicates=9, seed=0
            ),
            "same prompts",
        ),
    ],
)
def test_bad_input_raises(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_kendall_tau():
    tau = pytest.importorskip("scipy.stats").kendalltau
    rng = np.random.default_rng(0)
    for a, b in ((rng.normal(size=9), rng.normal(size=9)), (rng.integers(0, 4, 12), rng.integers(0, 4, 12))):
        assert stats.kendall_tau(a, b) == pytest.approx(tau(a, b).statistic)
    assert stats.kendall_tau([1, 2, 3], [3, 2, 1]) == -1.0
    assert math.isnan(stats.kendall_tau([1, 1, 1], [3, 2, 1]))
    with pytest.raises(ValueError, match="finite lists of one length"):
        stats.kendall_tau([1.0, math.nan], [1.0, 2.0])


def test_mean_of_independent_estimates():
    mean, (low, high) = stats.mean_of_independent([0.4, 0.6], [(0.3, 0.5), (0.5, 0.7)])
    assert (mean, low, high) == pytest.approx((0.5, 0.5 - 0.1 / 2**0.5, 0.5 + 0.1 / 2**0.5))
    mean, (low, high) = stats.mean_of_independent([0.9, 0.9], [(0.5, 1.0), (0.5, 1.0)])
    assert high - mean < mean - low  # skewed as its parts
    rng, hits, z = np.random.default_rng(0), 0, NormalDist().inv_cdf(0.975)
    for _ in range(BENCHMARKS):
        x = np.array([0.2, 0.5, 0.7]) + 0.05 * rng.normal(size=3)
        _, (low, high) = stats.mean_of_independent(x, np.stack([x - 0.05 * z, x + 0.05 * z], axis=1))
        hits += low <= 1.4 / 3 <= high
    assert 0.93 <= hits / BENCHMARKS <= 0.97
    with pytest.raises(ValueError, match=r"estimates \[k\]"):
        stats.mean_of_independent([], np.zeros((0, 2)))


def test_interval_of_q_covers_the_truth_with_bounds_drawn_along():
    """Q of the middle one of three methods: its FID, and the bounds that the other two set, redrawn jointly."""
    rng, N, D, shifts = np.random.default_rng(3), 100, 6, (0.5, 0.9, 1.4)
    reference = score.FeatureStatistics(np.zeros(D), np.eye(D))
    root, weights = np.eye(D), stats.resample_weights(N, 500, seed=0)
    found = []
    for _ in range(BENCHMARKS):
        drawn, fids = [], []
        for shift in shifts:
            one = stats.frechet_influence(rng.normal(size=(N, D)) + shift / D**0.5, reference, reference_root=root)
            drawn.append(one.distance + stats.mean_replicates(weights, stats.totals(np.arange(N), one.influence, N)))
            fids.append(one.distance)
        low, high = np.min(drawn, axis=0), np.max(drawn, axis=0)
        Q = score.quality(np.clip(drawn[1], low, high) - low, 0.0, high - low)
        found.append((*stats.percentile_interval(Q, score.quality(fids[1], min(fids), max(fids))), *fids))
    fids = np.mean(found, axis=0)[2:]
    truth = score.quality(fids[1], fids.min(), fids.max())
    assert 0.93 <= np.mean([low <= truth <= high for low, high, *_ in found]) <= 0.97


def test_rank_intervals_of_many_subjects_are_those_of_a_direct_count():
    values = np.random.default_rng(0).normal(size=(7, 50)).round(1)  # with ties
    ranks = 1 + np.sum(values[None] > values[:, None], axis=1)
    low, high = np.quantile(ranks, [0.025, 0.975], axis=1, method="inverted_cdf")
    assert stats.rank_intervals(values) == [(int(a), int(b)) for a, b in zip(low, high, strict=True)]
