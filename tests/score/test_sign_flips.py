"""The sign-flip test against all flips, random flips, and the tests of SciPy that are cases of it."""

import time
from itertools import product

import numpy as np
import pytest

from spqr_jax.score import sign_flips, stats
from spqr_jax.score.sign_flips import sign_flip_test


def all_flips(d):
    """The p value by its definition."""
    return np.mean(np.abs(np.array(list(product([-1.0, 1.0], repeat=len(d)))) @ d) >= abs(d.sum()) - 1e-9)


DIFFERENCES = {
    "one image": lambda rng, n: rng.choice([-100.0, 0.0, 100.0], n),
    "four images, three seeds": lambda rng, n: 100.0 * rng.integers(-12, 13, n) / 12.0,
    "undecided images": lambda rng, n: 100.0 * (rng.integers(0, 8, n) / 7.0 - rng.integers(0, 12, n) / 11.0),
    "cosines": lambda rng, n: 0.01 * rng.normal(size=n),
    "cosines of float32": lambda rng, n: (0.01 * rng.normal(size=n)).astype(np.float32).astype(float),
    "far apart": lambda rng, n: rng.normal(size=n) * np.where(rng.random(n) < 0.5, 1.0, 1e6),
}


@pytest.mark.parametrize("kind", DIFFERENCES)
def test_p_is_the_share_of_all_flips(kind):
    rng = np.random.default_rng(0)
    for n in [*range(1, 13)] * 5:
        d = DIFFERENCES[kind](rng, n)
        assert sign_flip_test(d)[0] == pytest.approx(all_flips(d), abs=1e-12), d


def test_it_is_the_exact_test_of_binomial_signs_and_of_signed_ranks():
    scipy = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(1)
    for n in (15, 200, 1500):
        plus = int(rng.binomial(n, 0.58))
        d = np.where(np.arange(n) < plus, 100.0, -100.0)
        assert sign_flip_test(d)[0] == pytest.approx(scipy.binomtest(plus, n).pvalue, rel=1e-9)
    ranks = np.arange(1.0, 46.0) * np.where(rng.random(45) < 0.75, 1.0, -1.0)
    assert sign_flip_test(ranks / 7.0)[0] == pytest.approx(scipy.wilcoxon(ranks, method="exact").pvalue, rel=1e-9)


@pytest.mark.parametrize(("n", "least", "error"), [(40, 1e-6, 0.02), (60, 1e-12, 0.01), (300, 1e-12, 0.01)])
def test_the_saddle_point_is_near_the_exact_tail(n, least, error):
    """On coarse grids and on grids so fine that they are none."""
    rng, found = np.random.default_rng(n), []
    for _ in range(25):
        for top, spacing in ((1, 2.0), (12, 2.0), (2000, 0.0)):
            sizes = rng.integers(1, top + 1, n)
            signs = np.where(rng.random(n) < rng.uniform(0.5, 0.5 + 2.5 * n**-0.5), 1, -1)
            observed = abs(int(signs @ sizes))
            exact = sign_flips._by_steps(sizes, observed)
            if exact > least:
                found.append(sign_flips._by_saddle_point(sizes.astype(float), observed, spacing=spacing) / exact)
    assert len(found) > 40
    np.testing.assert_allclose(found, 1.0, rtol=0.0, atol=error)


def test_many_random_flips_give_the_same_p_value():
    rng, flips = np.random.default_rng(2), 100_000
    for d in (rng.normal(size=60) + 0.3, 100.0 * rng.integers(-7, 9, 60) / 12.0, rng.exponential(size=60) - 0.7):
        extreme = np.abs(rng.choice([-1.0, 1.0], (flips, 60)) @ d) >= abs(d.sum()) - 1e-9
        p = sign_flip_test(d)[0]
        assert abs(extreme.mean() - p) < 4.0 * (p * (1.0 - p) / flips) ** 0.5


def test_p_does_not_depend_on_unit_side_order_and_equal_prompts():
    rng = np.random.default_rng(3)
    for d in (rng.normal(size=50) + 0.2, 100.0 * rng.integers(-3, 5, 50) / 4.0):
        p = sign_flip_test(d)[0]
        for other in (-d, d / 100.0, 1e-3 * d, rng.permutation(d), np.append(d, np.zeros(7))):
            assert sign_flip_test(other)[0] == pytest.approx(p, rel=1e-6)


def test_p_is_never_zero_and_never_above_one():
    rng = np.random.default_rng(4)
    for n in (1, 2, 50, 5000):
        for d in (np.full(n, 3.0), np.zeros(n), rng.normal(size=n) + 50.0, rng.normal(size=n), np.full(n, 1e-200)):
            assert 0.0 < sign_flip_test(d)[0] <= 1.0
    assert sign_flip_test(np.full(300, 100.0 / 3.0))[0] == pytest.approx(2.0**-299)
    assert sign_flip_test(np.arange(1.0, 301.0) ** 0.5)[0] == pytest.approx(2.0**-299)


def test_a_clear_difference_stays_significant_among_910_tests():
    """20 of 200 prompts differ, all one way, beside 909 tests in which nothing differs."""
    p = sign_flip_test(np.stack([np.where(np.arange(200) < 20, 100.0, 0.0), *np.zeros((909, 200))], axis=1))
    assert stats.holm(p)[0] == pytest.approx(910 * 2.0**-19, rel=1e-9) and stats.holm(p)[0] < 0.002


@pytest.mark.parametrize("kind", DIFFERENCES)
def test_ten_thousand_prompts_take_a_moment(kind):
    d = DIFFERENCES[kind](np.random.default_rng(5), 10_000)
    start = time.perf_counter()
    sign_flip_test(d)
    assert time.perf_counter() - start < 0.8  # 0.1 s at most alone on one core


def test_the_test_holds_its_level_on_every_path():
    rng = np.random.default_rng(6)
    few, many, on_grid = rng.normal(size=(24, 1500)), rng.normal(size=(100, 1500)), rng.choice([-1, 0, 1], (120, 1500))
    for d, least in ((few, 0.035), (many, 0.035), (on_grid, 0.02)):  # on a coarse grid few levels can be attained
        assert least <= np.mean(sign_flip_test(d) <= 0.05) <= 0.065


def test_replicates_and_seed_change_nothing():
    d = np.array([1.0, -2.0, 4.0])
    assert sign_flip_test(d, replicates=5, seed=1)[0] == sign_flip_test(d)[0] == stats.sign_flip_test(d, seed=0)[0]
