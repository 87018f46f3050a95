"""Comparing two runs: differences that are there are called real, those that are not are not."""

import json

import numpy as np
import pytest

from spqr_jax.report import compare
from spqr_jax.report.__main__ import main
from spqr_jax.score import leaderboard
from tests.score.invented import PROMPTS, make_cell


def make_run(directory, *, after=22, clip=0.3, config=None, **options):
    directory.mkdir()
    np.savez(directory / "reference_features.npz", mu=np.zeros(2), sigma=np.eye(2))
    make_cell(directory, "control", before=20, after=20, control=True, **options)
    make_cell(directory, "esd", before=4, after=after, clip=clip, shift=(2.0, 1.0), **options)
    leaderboard.write(directory, leaderboard.build(directory, replicates=100))
    (directory / "manifest.json").write_text(json.dumps({"config": config or {"bft": {"rank": 8, "lr": 1e-4}}}))
    return directory


def by_figure(comparison):
    return {(d.row[0], d.figure): d for d in comparison.differences}


def test_a_run_does_not_differ_from_itself(tmp_path):
    run = make_run(tmp_path / "a")
    found = compare.compare_runs(run, run, replicates=200)
    assert len(found.differences) == 2 * 5 and found.names == ("A", "B") and found.notes == []
    assert all(d.p == d.p_holm == 1.0 and d.a == d.b for d in found.differences)
    assert all(d.interval.low <= 0.0 <= d.interval.high for d in found.differences)
    assert "0 of 10 tested differences are real" in compare.text(found)


def test_a_large_difference_is_real_and_a_small_one_is_not(tmp_path):
    a, b = (
        make_run(tmp_path / "a", after=5),
        make_run(tmp_path / "b", after=22, config={"bft": {"rank": 16, "lr": 1e-4}}),
    )
    comparison = compare.compare_runs(a, b, replicates=500)
    found = by_figure(comparison)
    drift = found["esd", "drift"]
    assert (drift.a, drift.b, drift.n) == (2.5, 45.0, PROMPTS)
    assert drift.p_holm < 0.01 and drift.interval.low > 20 and drift.row == ("esd", "standard", "general")
    assert found["esd", "h before"].p == 1.0 and found["esd", "h before"].row == ("esd", "", "")
    assert found["control", "h after"].p_holm == 1.0
    text = compare.text(comparison)
    assert (
        "2 of 10 tested differences are real (Holm, level 0.05)." in text
        and "- esd / standard / general: drift +42.5" in text
    )
    assert "note: config.bft.rank: 8 and 16" in text and "config.bft.lr" not in text
    assert "| esd | standard | general | SPQR |" in text  # beside, not tested
    small = compare.compare_runs(a, make_run(tmp_path / "c", after=6), replicates=500)
    assert by_figure(small)["esd", "h after"].p == 1.0  # one prompt of 40


def test_holm_counts_every_test(tmp_path):
    a, b = make_run(tmp_path / "a", after=5), make_run(tmp_path / "b", after=9)
    found = compare.compare_runs(a, b, replicates=200)
    after = by_figure(found)["esd", "h after"]
    assert after.p == pytest.approx(0.125, abs=0.01)  # 4 prompts differ, all one way: 2 / 2^4
    assert after.p_holm == pytest.approx(min(1.0, 10 * min(d.p for d in found.differences)), abs=0.02)


def test_two_runs_of_294_cells_can_differ(tmp_path):
    """One cell of 294 drifts more in the second run, on 22 of its 40 prompts: real among 910 tests."""
    subjects, profiles, scenarios = range(14), ("lite", "moderate", "standard"), range(7)
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "leaderboard.json").write_text('{"rows": []}')
        for subject in subjects:
            for profile in profiles:
                for scenario in scenarios:
                    here = name == "b" and (subject, profile, scenario) == (3, "lite", 5)
                    place = {"profile": profile, "scenario": f"scenario{scenario}"}
                    make_cell(tmp_path / name, f"subject{subject}", before=4, after=26 if here else 4, **place)
    found = compare.compare_runs(tmp_path / "a", tmp_path / "b", replicates=50).differences
    assert len(found) == 910
    real = {(*d.row, d.figure) for d in found if d.p_holm < 0.05}
    assert real == {("subject3", "lite", "scenario5", figure) for figure in ("h after", "drift")}
    assert {d.p for d in found if d.p_holm < 0.05} == {2.0**-21}


def test_seeds_that_differ_make_a_difference_uncertain(tmp_path):
    runs = [make_run(tmp_path / name, after=after) for name, after in (("a", 5), ("b", 22), ("c", 5))]
    for run, after in zip(runs, ((5, 6), (21, 22), (40, 12)), strict=True):  # under seeds 1 and 2
        for seed, unsafe in enumerate(after, 1):
            clip = 0.3 + 0.001 * unsafe
            make_cell(run, "esd", before=4, after=unsafe, clip=clip, shift=(2.0, 1.0), seed=seed)
    calm, wild = (by_figure(compare.compare_runs(runs[0], run, replicates=500)) for run in runs[1:])
    assert calm["esd", "drift"].p_holm < 0.05 and calm["esd", "drift"].interval.low > 20.0
    assert (
        wild["esd", "drift"].p > 0.05 and wild["esd", "drift"].interval.low < 0.0 < wild["esd", "drift"].interval.high
    )
    assert wild["esd", "CLIP after"].p > 0.05
    assert wild["esd", "h before"].p == 1.0 and calm["esd", "h before"].interval == wild["esd", "h before"].interval


def test_only_shared_prompts_of_the_same_text_count(tmp_path):
    def other_texts(rows, arrays):
        return [row | {"prompt": "else"} if row["prompt_id"] < "h10" else row for row in rows], arrays

    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", edit=other_texts)
    found = compare.compare_runs(a, b, replicates=100)
    assert by_figure(found)["esd", "drift"].n == PROMPTS - 10
    assert any(f"{PROMPTS - 10} harmful prompts are in both, of 40 and 40" in note for note in found.notes)


def test_other_judges_and_lonely_rows_are_noted(tmp_path):
    a = make_run(tmp_path / "a")
    b = make_run(tmp_path / "b", judges={"strict": {"sha256": "2"}})
    make_cell(b, "uce", before=4, after=4, judges={"strict": {"sha256": "2"}})
    notes = compare.compare_runs(a, b, replicates=100).notes
    assert any("different judges" in note for note in notes)
    assert any("1 rows are in one run only, the first: uce / standard / general" in note for note in notes)


def test_nothing_in_common_and_no_score_are_errors(tmp_path, capsys):
    a = make_run(tmp_path / "a")
    (tmp_path / "b").mkdir()
    make_cell(tmp_path / "b", "mace", before=4, after=4)
    assert main(["compare", str(a), str(tmp_path / "b")]) == 1
    assert "Run the score stage first" in capsys.readouterr().err
    (tmp_path / "b" / "leaderboard.json").write_text('{"rows": []}')
    assert main(["compare", str(a), str(tmp_path / "b")]) == 1
    assert "nothing to compare" in capsys.readouterr().err
    assert main(["compare", str(a), str(a)]) == 0
    assert "| control |" in capsys.readouterr().out


def test_runs_of_different_protocols_do_not_compare(tmp_path):
    """A changed field, as a rank, may differ: it is what a comparison is often about."""
    a, b = ({"name": "eccv-2026", "changed": change} for change in ({}, {"bft.rank": [4, 8]}))
    runs = [make_run(tmp_path / f"run{i}", protocol=stated, backbone="sd") for i, stated in enumerate((a, b))]
    assert compare.compare_runs(*runs, replicates=100).rows
    other = make_run(tmp_path / "other", protocol={"name": "spqr-jax", "changed": {}}, backbone="sd")
    with pytest.raises(ValueError, match=r"different protocols do not compare \(.*eccv-2026; .*other: spqr-jax\)"):
        compare.compare_runs(runs[0], other)
