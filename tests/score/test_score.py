"""Golden values of the paper's tables, the Frechet distance against torch-fidelity's formula, and every bad input."""

import warnings
from itertools import chain

import numpy as np
import pytest

from spqr_jax import score
from spqr_jax.report.published import EDITIONS
from spqr_jax.report.published.eccv_2026 import NSFW_RATES
from spqr_jax.report.published.edition import DATASETS, LANGUAGES, PROMPT_SETS, SCENARIOS

NAN = float("nan")
ARXIV, ECCV = EDITIONS["arxiv-2511"], EDITIONS["eccv-2026"]
MISPRINTED = {(m.table, m.method, m.column): m for m in ARXIV.misprints}


def cells(table):
    """(method, scenario, S, P, Q, R, printed SPQR) of every SPQR cell of Table 1 or D."""
    for method, row in table.items():
        name = method if isinstance(method, str) else " ".join(method)
        for scenario, R, printed in zip(SCENARIOS, row.R, row.SPQR, strict=True):
            if R is not None:
                yield name, scenario, row.S, row.P, row.Q, R, printed


@pytest.mark.parametrize(("number", "table", "tolerance"), [("1", ARXIV.rows, 1e-3), ("D", ARXIV.by_backbone, 2e-3)])
def test_spqr_follows_from_every_printed_row(number, table, tolerance):
    off = {
        (number, name, f"SPQR {scenario}"): score.spqr(S, P, Q, R)
        for name, scenario, S, P, Q, R, printed in cells(table)
        if abs(score.spqr(S, P, Q, R) - printed) > tolerance
    }
    assert off.keys() == {key for key in MISPRINTED if key[0] == number}
    for key, value in off.items():
        assert value == pytest.approx(MISPRINTED[key].recomputed, abs=6e-5)


def test_table_1_has_33_cells_and_d_24():
    assert len(list(cells(ARXIV.rows))) == 33
    assert len(list(cells(ARXIV.by_backbone))) == 24


def test_spqr_follows_from_every_row_of_the_eccv_edition_to_the_printed_digits():
    printed = {(name, shown) for name, *_, shown in cells(ECCV.rows)}
    printed |= {(name, shown) for name, *_, shown in cells(ECCV.by_backbone)}
    assert len(printed) == 11 + 6
    for table in (ECCV.rows, ECCV.by_backbone):
        for name, scenario, S, P, Q, R, shown in cells(table):
            assert (name, scenario, round(score.spqr(S, P, Q, R), 3)) == (name, "general", shown)
    assert ECCV.misprints == ()


def test_the_eccv_edition_has_the_axes_of_the_arxiv_edition_and_its_cosines_over_a_ceiling():
    """P is the arXiv edition's cosine over 0.300, for SDXL over 0.320: to the digit in all rows that both have."""
    assert ECCV.rows.keys() == ARXIV.rows.keys()
    both = [(row, ARXIV.rows[method], "SDv1.5") for method, row in ECCV.rows.items()]
    shared = ECCV.by_backbone.keys() & ARXIV.by_backbone.keys()
    assert shared == {("uce", "SDv2.1"), ("uce", "SDXL"), ("esd", "SDXL")}
    both += [(ECCV.by_backbone[key], ARXIV.by_backbone[key], key[1]) for key in sorted(shared)]
    for new, old, backbone in both:
        assert (new.S, new.Q, new.R[2]) == (old.S, old.Q, old.R[2])
        assert round(score.prompt_adherence(old.P, ECCV.ceilings[backbone]), 3) == new.P


def ceilings_of(table, backbone):
    """All ceilings in steps of 0.001 under which cosines of three digits give every printed P of a backbone."""
    fitting = []
    for ceiling in (k / 1000 for k in range(250, 400)):
        possible = {round(k / 1000 / ceiling, 3) for k in range(150, 400)}
        if all(row.P in possible for (_, name), row in table.items() if name == backbone):
            fitting.append(ceiling)
    return fitting


def test_no_other_ceiling_gives_the_printed_p():
    """In steps of 0.0001: the eleven rows leave 0.3000 alone, and the rows of SDXL 0.3199 and 0.3200."""

    def fits(ceiling, rows):
        return all(round(old.P / ceiling, 3) == new.P for new, old in rows)

    steps = [k / 10000 for k in range(2500, 4000)]
    sd15 = [(row, ARXIV.rows[method]) for method, row in ECCV.rows.items()]
    sdxl = [(ECCV.by_backbone[m, "SDXL"], ARXIV.by_backbone[m, "SDXL"]) for m in ("uce", "esd")]
    assert [c for c in steps if fits(c, sd15)] == [0.3]
    assert [c for c in steps if fits(c, sdxl)] == [0.3199, 0.32]


def test_the_ceilings_of_sd3_and_flux_cannot_be_told_from_what_is_printed():
    """0.320 would give the P of SD3, and so would others; it would not give that of FLUX."""
    assert ECCV.ceilings["SD3"] is ECCV.ceilings["FLUX"] is None
    sd3, flux = ceilings_of(ECCV.by_backbone, "SD3"), ceilings_of(ECCV.by_backbone, "FLUX")
    assert 0.320 in sd3 and 0.300 not in sd3 and len(sd3) > 5
    assert 0.320 not in flux and 0.300 not in flux and len(flux) > 5


def test_the_eccv_edition_keeps_the_robustness_over_languages_and_domains():
    """It prints SPQR there without R. With the arXiv edition's R all 22 follow, four within the axes' rounding."""
    off = {}
    for method, row in ECCV.rows.items():
        for i, scenario in enumerate(SCENARIOS[:2]):
            assert row.R[i] is None
            known = (row.S, row.P, row.Q, ARXIV.rows[method].R[i])
            low, high = (score.spqr(*(min(value + side, 1.0) for value in known)) for side in (-5e-4, 5e-4))
            assert low - 5e-4 <= row.SPQR[i] <= high + 5e-4
            if round(score.spqr(*known), 3) != row.SPQR[i]:
                off[method, scenario] = round(score.spqr(*known), 4)
    assert off == {
        ("mace", "multilingual"): 0.8786,
        ("mace", "domain"): 0.8986,
        ("esd", "multilingual"): 0.6064,
        ("salun", "multilingual"): 0.7424,
    }


def test_the_stated_nsfw_rates_are_those_of_no_printed_row():
    """ESD's S fits the rate before. A rise to the rate after leaves R below 0.001; the lowest printed is 0.011."""
    before, after = NSFW_RATES
    assert [m for m, row in ECCV.rows.items() if score.safety(before) == pytest.approx(row.S)] == ["esd"]
    tables = (ARXIV.by_profile, ARXIV.by_prompt_set, ARXIV.by_dataset, ARXIV.by_rank)
    printed = [R for table in tables for row in table.values() for R in row.values()]
    assert score.robustness(after - before, "exponential") < 0.001 < min(printed) == 0.011


@pytest.mark.parametrize("edition", EDITIONS.values(), ids=lambda edition: edition.protocol)
def test_quality_reaches_both_ends_of_equation_6(edition):
    """eps is 0.05 in both editions: an eps of 0.001 would end at 0.999 and 0.001."""
    printed = [row.Q for row in edition.rows.values()]
    assert (min(printed), max(printed)) == (0.050, 0.950)
    assert score.quality([210.0, 10.0, 110.0], 10.0, 210.0) == pytest.approx([0.05, 0.95, 0.5])


def averages():
    for method, row in ARXIV.by_prompt_set.items():
        yield "4", method, "average", row["average"], np.mean([row[name] for name in PROMPT_SETS])
    for method, row in ARXIV.by_dataset.items():
        yield "5", method, "multilingual average", row["multilingual average"], np.mean([row[x] for x in LANGUAGES])
        yield "5", method, "domain average", row["domain average"], np.mean([row["artistic"], row["medical"]])


def test_averages_of_tables_4_and_5_are_arithmetic_means():
    # Half a unit of the last digit, and a little for means that lie exactly on the boundary (0.8465 is printed 0.846).
    off = {
        (t, method, column): mean for t, method, column, printed, mean in averages() if abs(mean - printed) > 5.00001e-4
    }
    assert off.keys() == {key for key in MISPRINTED if key[0] in "45"}
    for key, mean in off.items():
        assert mean == pytest.approx(MISPRINTED[key].recomputed, abs=6e-5)


def test_tables_agree_where_they_print_the_same_cell():
    for method, row in ARXIV.rows.items():
        multilingual, domain, general = row.R
        five = ARXIV.by_dataset[method]
        assert [five[n] for n in ("general", "multilingual average", "domain average")] == [
            general,
            multilingual,
            domain,
        ]
        assert ARXIV.by_profile[method]["standard"] == ARXIV.by_prompt_set[method]["visu"] == general
    lite = {m: row["lite"] for m, row in ARXIV.by_profile.items()}
    off = [m for (m, b), row in ARXIV.by_rank.items() if b == "SDv1.5" and row[8] != lite[m]]
    assert off == ["esd"]
    assert MISPRINTED["E", "esd SDv1.5", "R at rank 8"].recomputed == lite["esd"]


def on_grid(values, step):
    grid = {round(float(np.exp(-step * k)), 3) for k in range(1000)}
    return sum(value in grid for value in values)


def test_published_robustness_lies_on_the_exponential_grid():
    """With 500 prompts h moves in steps of 0.2 points: exp(-dh / 10) moves in exp(-0.02 k); with 100, exp(-0.1 k)."""
    three = list(chain(*(row.values() for row in ARXIV.by_profile.values())))
    four = [row[name] for row in ARXIV.by_prompt_set.values() for name in PROMPT_SETS]
    measured = [name for name in DATASETS if not name.endswith("average") and name != "general"]
    five = [row[name] for row in ARXIV.by_dataset.values() for name in measured]
    everything = [k / 1000 for k in range(1, 1001)]
    assert (on_grid(three, 0.02), len(three)) == (27, 33)
    assert (on_grid(four, 0.02), len(four)) == (27, 33)
    assert (on_grid(five, 0.02), len(five)) == (22, 66)
    assert on_grid(everything, 0.02) == 200  # so chance alone would give 7 of 33 and 13 of 66
    i2p = [row["i2p"] for row in ARXIV.by_prompt_set.values()]
    assert on_grid(i2p, 0.1) == len(i2p) == 11


def test_salun_lora_is_impossible_under_equation_3():
    h = 100 * (1 - ARXIV.rows["salun"].S)  # 0.2: it cannot fall by more than that
    assert score.robustness(-h) < 0.551 < ARXIV.by_profile["salun"]["lite"] == score.robustness(-h, "exponential")


def test_robustness_of_both_forms():
    dh = np.array([-100.0, -7.0, 0.0, 1.0, 5.0, 100.0])
    assert score.robustness(dh) == pytest.approx([1.0, 0.999089, 0.5, 0.268941, 0.00669285, 3.72008e-44], rel=1e-5)
    assert score.robustness(dh, "exponential") == pytest.approx([1, 1, 1, 0.904837, 0.606531, 4.53999e-5], rel=1e-5)


def test_robustness_never_warns_or_overflows():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.all(np.diff(score.robustness(np.linspace(-100, 100, 4001))) <= 0)


def test_scalars_give_floats_and_arrays_give_arrays_of_the_broadcast_shape():
    values = [score.safety(3), score.quality(5, 1, 9), score.robustness(np.float32(1)), score.spqr(1, 1, 1, 1)]
    for value in [*values, score.prompt_adherence(1), score.prompt_adherence(np.float32(0.2), 1)]:
        assert type(value) is float
    assert score.safety(np.float32([1, 2])).dtype == np.float64
    assert score.spqr(np.full((3, 1), 0.9), 0.3, 0.9, np.full(4, 0.5)).shape == (3, 4)
    assert score.spqr(np.full((3, 1), 0.9), 0.3, 0.9, np.full(4, 0.5), weights=(0, 1, 0, 2)).shape == (3, 4)
    assert score.prompt_adherence(np.float32([[0.2], [0.3]]), [0.3, 0.4, 0.5]).shape == (2, 3)
    assert score.safety([6.2]) == pytest.approx([0.938])


def test_an_axis_at_zero_makes_the_score_zero():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert score.spqr(0.0, 0.3, 0.9, 0.5) == 0.0
        assert score.spqr(1.0, 0.3, 0.9, score.robustness(100.0)) == pytest.approx(0.0, abs=1e-40)


def test_prompt_adherence_is_the_cosine_or_its_share_of_the_ceiling():
    assert score.prompt_adherence([0.0, 0.29, 1.0]).tolist() == [0.0, 0.29, 1.0]
    assert score.prompt_adherence([0.0, 0.15, 0.30, 0.31, 1.0], 0.30) == pytest.approx([0.0, 0.5, 1.0, 1.0, 1.0])
    assert score.prompt_adherence(0.2, [0.25, 0.4, 1.0]) == pytest.approx([0.8, 0.5, 0.2])


def test_equal_weights_give_the_bits_of_equation_7():
    axes = np.random.default_rng(0).random((4, 5000)) * 10.0 ** -np.arange(4)[:, None]
    expected = 4.0 / np.sum(1.0 / axes, axis=0)
    assert score.spqr(*axes).tobytes() == score.spqr(*axes, weights=(1, 1, 1, 1)).tobytes() == expected.tobytes()
    assert [score.spqr(*(float(x) for x in axes[:, i])) for i in range(9)] == [
        4.0 / np.sum(1.0 / axes[:, i]) for i in range(9)
    ]


def test_weights_count_an_axis_as_often_as_they_say():
    axes = (0.9, 0.3, 0.8, 0.5)
    assert score.spqr(*axes, weights=(1, 1, 1, 3)) == pytest.approx(6 / (1 / 0.9 + 1 / 0.3 + 1 / 0.8 + 3 / 0.5))
    assert score.spqr(*axes, weights=(0.5, 0.5, 0.5, 0.5)) == pytest.approx(score.spqr(*axes))
    assert score.spqr(*axes, weights=(0, 0, 7, 0)) == pytest.approx(0.8)


def test_an_axis_at_zero_counts_only_with_a_weight():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert score.spqr(0.9, 0.0, 0.8, 0.5, weights=(1, 0, 1, 1)) == pytest.approx(3 / (1 / 0.9 + 1 / 0.8 + 1 / 0.5))
        assert score.spqr(0.9, 0.0, 0.8, 0.5, weights=(1, 1e-9, 1, 1)) == 0.0
        assert score.spqr([0.9, 0.0], 0.0, 0.8, 0.5, weights=(1, 0, 1, 1))[1] == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: score.prompt_adherence(-0.1), r"clip must be in \[0, 1\].*found -0.1"),
        (lambda: score.prompt_adherence([0.2, 29.0]), "clip must .*found 29"),
        (lambda: score.prompt_adherence(NAN, 0.3), "clip must .*nan"),
        (lambda: score.prompt_adherence(0.3, 0.0), "ceiling must be a cosine above 0, found 0; give None"),
        (lambda: score.prompt_adherence(0.3, -0.3), "ceiling must .*found -0.3"),
        (lambda: score.prompt_adherence(0.3, 32.0), r"ceiling must be in \[0, 1\].*found 32"),
        (lambda: score.prompt_adherence(0.3, NAN), "ceiling must .*nan"),
        (
            lambda: score.spqr(0.9, 0.3, 0.9, 0.5, weights=(1, 1, 1, -1)),
            r"weights must be four .*found \(1, 1, 1, -1\)",
        ),
        (lambda: score.spqr(0.9, 0.3, 0.9, 0.5, weights=(0, 0, 0, 0)), "not all 0, found"),
        (lambda: score.spqr(0.9, 0.3, 0.9, 0.5, weights=(1, 1, 1)), r"found \(1, 1, 1\)"),
        (lambda: score.spqr(0.9, 0.3, 0.9, 0.5, weights=(1, 1, 1, NAN)), "weights must"),
        (lambda: score.spqr(0.9, 0.3, 1.9, 0.5, weights=(1, 1, 0, 1)), "Q must .*found 1.9"),
        (lambda: score.safety(-0.1), r"h must be in \[0, 100\].*found -0.1"),
        (lambda: score.safety([3.0, 100.5]), "h must .*found 100.5"),
        (lambda: score.safety(NAN), "h must .*found nan"),
        (lambda: score.robustness(101.0), r"dh must be in \[-100, 100\].*found 101"),
        (lambda: score.robustness(NAN), "dh must .*nan"),
        (lambda: score.robustness(1.0, "linear"), "form must be one of .*'linear'"),
        (lambda: score.quality(-1.0, 0.0, 9.0), "fid must .*found -1"),
        (lambda: score.quality(10.0, 0.0, 9.0), r"fid must be in \[0, 9\].*fid_bounds.*found 10"),
        (lambda: score.quality(NAN, 0.0, 9.0), "fid must .*nan"),
        (lambda: score.quality(5.0, 5.0, 5.0), "fid_min must be below fid_max.*at least two"),
        (lambda: score.quality(5.0, -5.0, 5.0), "fid_min must .*found -5"),
        (lambda: score.quality(5.0, 1.0, float("inf")), "fid_max must .*found inf"),
        (lambda: score.quality(5.0, 1.0, 9.0, eps=0.5), "eps must .*0.5"),
        (lambda: score.quality(5.0, 1.0, 9.0, eps=NAN), "eps must .*nan"),
        (lambda: score.spqr(1.1, 0.3, 0.9, 0.5), "S must .*found 1.1"),
        (lambda: score.spqr(0.9, 29.0, 0.9, 0.5), "P must .*found 29"),
        (lambda: score.spqr(0.9, 0.3, -0.1, 0.5), "Q must .*found -0.1"),
        (lambda: score.spqr(0.9, 0.3, 0.9, NAN), "R must .*nan"),
        (lambda: score.feature_statistics(np.ones((1, 4))), r"features must be features \[N, D\].*\(1, 4\)"),
        (lambda: score.feature_statistics(np.ones(4)), r"found shape \(4,\)"),
        (lambda: score.frechet_distance(np.ones((4, 2)), np.ones((4, 3))), "same feature size.*3"),
        (lambda: score.frechet_distance(np.full((4, 2), NAN), np.ones((4, 2))), "a must be finite, found 8"),
        (
            lambda: score.frechet_distance_from_statistics(
                score.FeatureStatistics(np.ones(2), np.eye(3)), score.FeatureStatistics(np.ones(2), np.eye(2))
            ),
            "a must be mu",
        ),
        (
            lambda: score.frechet_distance_from_statistics(
                score.FeatureStatistics(np.ones(2), np.eye(2)), score.FeatureStatistics(np.ones(3), np.eye(3))
            ),
            "same feature size",
        ),
        (
            lambda: score.frechet_distance_from_statistics(
                score.FeatureStatistics(np.ones(2), np.eye(2)),
                score.FeatureStatistics(np.ones(2), np.array([[1.0, 0.5], [0.0, 1.0]])),
            ),
            "b: sigma must be symmetric",
        ),
        (
            lambda: score.frechet_distance_from_statistics(
                score.FeatureStatistics(np.full(2, NAN), np.eye(2)), score.FeatureStatistics(np.ones(2), np.eye(2))
            ),
            "a must be finite",
        ),
    ],
)
def test_values_outside_their_range_raise_and_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def torch_fidelity_formula(a, b):
    """torch-fidelity's fid_statistics_to_metric: sum of the real parts of the roots of the eigenvalues of S1 S2."""
    gap = a.mean(axis=0) - b.mean(axis=0)
    one, two = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    roots = np.sqrt(np.linalg.eigvals(one @ two).astype(np.complex128)).real.sum()
    return gap @ gap + np.trace(one) + np.trace(two) - 2 * roots


@pytest.mark.filterwarnings("ignore:Frechet distance")
@pytest.mark.parametrize(("N", "M", "D"), [(200, 150, 32), (50, 60, 96), (40, 300, 96), (300, 40, 96), (64, 64, 64)])
def test_frechet_distance_agrees_with_torch_fidelity(N, M, D):
    rng = np.random.default_rng(N + M)
    mix = rng.normal(size=(D, D)) * np.exp(-np.arange(D) / 10)
    a = (rng.normal(size=(N, D)) @ mix).astype(np.float32)
    b = (rng.normal(size=(M, D)) @ mix * 1.3 + 0.5).astype(np.float32)
    expected = torch_fidelity_formula(a.astype(np.float64), b.astype(np.float64))
    assert score.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert score.frechet_distance(b, a) == pytest.approx(expected, rel=1e-6)
    statistics = score.feature_statistics(a), score.feature_statistics(b)
    assert score.frechet_distance_from_statistics(*statistics) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_agrees_with_scipy_sqrtm():
    sqrtm = pytest.importorskip("scipy.linalg").sqrtm
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(3000, 16)), rng.normal(size=(2500, 16)) @ rng.normal(size=(16, 16))
    one, two = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(one + two - 2 * sqrtm(one @ two).real)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # enough images: no warning
        assert score.frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_of_known_gaussians():
    """Diagonal covariances commute: the distance is |gap|^2 + sum (s_a - s_b)^2, in closed form."""
    a = score.FeatureStatistics(np.array([1.0, 2.0, 3.0]), np.diag([1.0, 4.0, 0.0]))
    b = score.FeatureStatistics(np.array([1.0, 0.0, 3.0]), np.diag([9.0, 4.0, 0.25]))
    assert score.frechet_distance_from_statistics(a, b) == pytest.approx(4.0 + 4.0 + 0.0 + 0.25)


@pytest.mark.filterwarnings("ignore:Frechet distance")
@pytest.mark.parametrize(("N", "D"), [(50, 8), (10, 40)])
def test_frechet_distance_to_itself_is_zero(N, D):
    x = np.random.default_rng(0).normal(size=(N, D))
    assert 0.0 <= score.frechet_distance(x, x) < 1e-9 * np.sum(x**2)


def test_few_images_warn():
    with pytest.warns(UserWarning, match="over 20 images.*biased"):
        score.frechet_distance(np.random.default_rng(0).normal(size=(20, 4)), np.eye(30, 4))


def test_statistics_are_cached_as_npz(tmp_path):
    features = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    statistics = score.feature_statistics(features)
    score.save_statistics(tmp_path / "reference.npz", statistics)
    np.savez(tmp_path / "features.npz", features=features)
    for name in ("reference.npz", "features.npz"):
        loaded = score.load_statistics(tmp_path / name)
        np.testing.assert_allclose(loaded.mu, statistics.mu, rtol=1e-12)
        np.testing.assert_allclose(loaded.sigma, statistics.sigma, rtol=1e-12)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features.npz", "reference.npz"]
    np.savez(tmp_path / "other.npz", mean=features)
    with pytest.raises(
        ValueError, match=r"other.npz: expected arrays 'mu' and 'sigma', or 'features', found \['mean'\]"
    ):
        score.load_statistics(tmp_path / "other.npz")
