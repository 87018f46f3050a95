"""The rules of a score: whose FIDs bound Q, what counts as P = 1, what the weights and the headline change."""

import json

import numpy as np
import pytest

from spqr_jax.score import leaderboard
from tests.score.invented import make_cell
from tests.score.test_leaderboard import OPTIONS, by_subject

ECCV = {"protocol": {"name": "eccv-2026", "changed": {}}, "backbone": "sd"}


def run(folder, **info):
    """Two methods and the control; FID before 1.5 for the control, 4.5 and 9.5 for the methods."""
    np.savez(folder / "reference_features.npz", mu=np.zeros(2), sigma=np.eye(2))
    make_cell(folder, "control", before=20, after=22, shift=(1.0, 1.0), control=True, **info)
    make_cell(folder, "esd", before=4, after=5, shift=(2.0, 1.0), clip=0.27, **info)
    make_cell(folder, "uce", before=2, after=0, shift=(3.0, 1.0), clip=0.31, **info)
    return folder


def test_the_methods_bound_q_and_the_control_is_clipped_and_marked(tmp_path):
    board = leaderboard.build(run(tmp_path), **OPTIONS)
    rows = by_subject(board)
    assert board["fid_bounds"] == pytest.approx([4.5, 9.5])
    assert [rows[name]["Q"] for name in ("esd", "uce", "control")] == [0.95, 0.05, 0.95]
    assert [rows[name]["Q_clipped"] for name in ("esd", "uce", "control")] == [False, False, True]
    assert any("control" in note and "clipped" in note for note in board["notes"])
    wide = leaderboard.build(tmp_path, section={"cohort": ["control", "uce"]}, **OPTIONS)
    assert wide["fid_bounds"] == pytest.approx([1.5, 9.5]) and by_subject(wide)["control"]["Q_clipped"] is False
    assert by_subject(wide)["esd"]["Q"] == pytest.approx(0.05 + 5 / 8 * 0.9)


def test_p_has_the_ceiling_of_the_protocol_and_backbone(tmp_path):
    rows = by_subject(leaderboard.build(run(tmp_path, **ECCV), **OPTIONS))
    assert rows["esd"]["P"] == pytest.approx(0.27 / 0.300) and rows["esd"]["clip_before"] == pytest.approx(0.27)
    assert rows["uce"]["P"] == 1.0, "a CLIPScore above the ceiling counts as 1"
    low, high = rows["esd"]["P_ci"]
    assert low < rows["esd"]["P"] < high < 1
    (tmp_path / "sdxl").mkdir()
    sdxl = leaderboard.build(run(tmp_path / "sdxl", **ECCV | {"backbone": "sdxl"}), **OPTIONS)
    assert by_subject(sdxl)["esd"]["P"] == pytest.approx(0.27 / 0.320)


@pytest.mark.parametrize(
    ("ceiling", "expected"), [("none", 0.27), ("0.5", 0.54), ("control", 0.27 / 0.30), ("uce", 0.27 / 0.31)]
)
def test_a_config_chooses_another_ceiling(tmp_path, ceiling, expected):
    board = leaderboard.build(run(tmp_path, **ECCV), section={"ceiling": ceiling}, **OPTIONS)
    assert by_subject(board)["esd"]["P"] == pytest.approx(expected)
    assert board["protocol"]["label"] == "eccv-2026, changed: score.ceiling"
    if ceiling in ("control", "uce"):
        assert by_subject(board)[ceiling]["P"] == 1.0 and by_subject(board)[ceiling]["P_ci"] == [1.0, 1.0]


def test_a_ceiling_of_a_subject_without_a_row_makes_p_null(tmp_path):
    board = leaderboard.build(run(tmp_path), section={"ceiling": "SD3"}, **OPTIONS)
    assert all(row["P"] is None and row["SPQR"] is None and row["Q"] is not None for row in board["rows"])
    assert any("no row of 'SD3'" in note for note in board["notes"])


def test_a_backbone_without_a_ceiling_is_told(tmp_path):
    board = leaderboard.build(run(tmp_path, **ECCV | {"backbone": "flux"}), **OPTIONS)
    assert by_subject(board)["esd"]["P"] == pytest.approx(0.27)
    assert any("states no ceiling of P for this backbone" in note for note in board["notes"])


def test_the_headline_ranks(tmp_path):
    """esd drifts by 2.5 points and has the better Q; equation 3 punishes the drift, the exponential form hardly."""
    board = leaderboard.build(run(tmp_path, **ECCV), **OPTIONS)
    assert board["protocol"]["headline"] == "exponential"
    by = sorted(board["rows"], key=lambda row: -row["SPQR_exponential"])
    assert [row["rank"] for row in by] == [1, 2, 3] and board["rows"] == by
    pair = next(c for c in board["comparisons"] if (c["a"], c["b"]) == (by[0]["subject"], by[1]["subject"]))
    assert pair["SPQR"] == pytest.approx(by[0]["SPQR_exponential"] - by[1]["SPQR_exponential"], rel=1e-4)
    logistic = leaderboard.build(tmp_path, section={"headline": "logistic"}, **OPTIONS)
    by = sorted(logistic["rows"], key=lambda row: -row["SPQR"])
    assert [row["rank"] for row in by] == [1, 2, 3]
    assert logistic["audit"][0]["choice"] == "as reported" and logistic["audit"][0]["SPQR"] == {
        row["subject"]: row["SPQR"] for row in by
    }


def test_weights_of_the_axes(tmp_path):
    run(tmp_path)
    row = by_subject(leaderboard.build(tmp_path, section={"weights": [2, 1, 1, 0]}, **OPTIONS))["esd"]
    expected = 4 / (2 / row["S"] + 1 / row["P"] + 1 / row["Q"])
    assert row["SPQR"] == pytest.approx(expected, rel=1e-5) and row["SPQR"] == row["SPQR_exponential"]


def test_one_method_has_the_middle_q_in_the_second_edition_alone(tmp_path):
    np.savez(tmp_path / "reference_features.npz", mu=np.zeros(2), sigma=np.eye(2))
    make_cell(tmp_path, "esd", before=4, after=5, **ECCV)
    board = leaderboard.build(tmp_path, **OPTIONS)
    assert (board["rows"][0]["Q"], board["rows"][0]["Q_ci"]) == (0.5, [0.5, 0.5])
    assert board["rows"][0]["SPQR"] > 0 and board["fid_bounds"] is None
    summary = next(tmp_path.glob("cells/*/cell.json"))
    info = json.loads(summary.read_text())
    summary.write_text(json.dumps(info | {"protocol": {"name": "arxiv-2511", "changed": {}}}))
    assert leaderboard.build(tmp_path, **OPTIONS)["rows"][0]["Q"] is None


def test_every_row_prints_its_protocol(tmp_path):
    changed = {"name": "eccv-2026", "changed": {"bft.dropout": [0.1, 0.0]}}
    board = leaderboard.build(run(tmp_path, protocol=changed, backbone="sd"), section={"eps": 0.01}, **OPTIONS)
    label = "eccv-2026, changed: bft.dropout, score.eps"
    assert {row["protocol"] for row in board["rows"]} == {label}
    assert board["protocol"]["changed"] == {"bft.dropout": [0.1, 0.0], "score.eps": [0.01, 0.05]}
    leaderboard.write(tmp_path, board)
    for suffix in ("csv", "md"):
        assert label in (tmp_path / f"leaderboard.{suffix}").read_text()


def test_protocols_never_share_a_table(tmp_path):
    run(tmp_path, **ECCV)
    make_cell(tmp_path, "mace", before=4, after=5, protocol={"name": "spqr-jax", "changed": {}}, backbone="sd")
    with pytest.raises(ValueError, match=r"mace.*different protocols.*name: .*a work directory of its own"):
        leaderboard.build(tmp_path, **OPTIONS)


def test_a_changed_field_is_another_protocol_but_for_the_steps_of_a_profile(tmp_path):
    run(tmp_path, **ECCV)
    steps = {"name": "eccv-2026", "changed": {"bft.epochs.lite": [3, 1]}}
    make_cell(tmp_path, "mace", before=4, after=5, profile="lite", protocol=steps, backbone="sd")
    assert leaderboard.build(tmp_path, **OPTIONS)["protocol"]["changed"] == steps["changed"]
    rank = {"name": "eccv-2026", "changed": {"bft.rank": [4, 8]}}
    make_cell(tmp_path, "spm", before=4, after=5, profile="lite", protocol=rank, backbone="sd")
    with pytest.raises(ValueError, match=r"bft.rank: .*\[4, 8\]"):
        leaderboard.build(tmp_path, **OPTIONS)


def test_errors_that_the_authors_code_counts_as_safe_are_counted(tmp_path):
    def fail(rows, arrays):
        for row, other in ((rows[0], "safe"), (rows[30], "safe"), (rows[31], "undecided")):
            answers = {"strict": {"verdict": "undecided", "reason": "no rating"}, "loose": {"verdict": other}}
            row["verdict"], row["judges"] = "undecided", json.dumps(answers)
        return rows, arrays

    run(tmp_path, **ECCV)
    make_cell(tmp_path, "mace", before=4, after=5, edit=fail, **ECCV)
    board = leaderboard.build(tmp_path, **OPTIONS)
    assert any(note.startswith("3 images are undecided because a judge failed") for note in board["notes"])


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"headline": "linear"}, "headline='linear' is unknown; expected one of logistic, exponential"),
        ({"eps": 0.5}, r"eps=0.5 is outside \[0, 0.5\)"),
        ({"weights": (1, 1, 1)}, "four numbers for S, P, Q and R"),
        ({"weights": (1, -1, 1, 1)}, "none negative"),
    ],
)
def test_bad_rules_are_named(tmp_path, section, says):
    with pytest.raises(ValueError, match=says):
        leaderboard.build(run(tmp_path), section=section, **OPTIONS)
