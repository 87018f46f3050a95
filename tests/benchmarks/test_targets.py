"""The tables of memory by target: what is read from answers, and what a cell without one says."""

import json

import pytest

from benchmarks import targets

STEP = {"program": "training step, standard", "fsdp": True, "remat": True, "accumulate": 2, "reason": ""}
ROWS = [
    {"program": "text encoding", "bytes": 250_000_000, "limit_bytes": 16_900_000_000, "batch": 64, "reason": ""},
    {"program": "image encoding", "bytes": 2_250_000_000, "limit_bytes": 16_900_000_000, "batch": 4, "reason": ""},
    STEP | {"bytes": 15_580_000_000, "limit_bytes": 16_900_000_000, "batch": 16},
    {"program": "sampler", "bytes": None, "limit_bytes": 1, "batch": 16, "reason": "stopped after 9 s"},
]


def write(folder, target, **changes):
    answer = {"programs": ROWS, "fits": True, "hours": {"device_hours": 2.84}} | changes
    (folder / f"SD1.5_{target}.json").write_text(json.dumps(answer))


def test_a_row_of_the_table(tmp_path):
    write(tmp_path, "h100")
    lines = targets.table(tmp_path, "SD1.5", ["h100", "a6000"]).splitlines()
    assert lines[0] == "SD1.5, `configs/general.py`:" and lines[2].startswith("| target | training step, GB")
    step = "standard 15.6 of 16.9 (split, remat, 2 parts)"
    assert lines[4] == f"| h100 | {step} | stopped after 9 s, 16 images | 2.25 of 16.9 | 2.84 | yes |"
    assert lines[5] == "| a6000 | not asked |  |  |  | not known |"


def test_a_row_of_aligning_steps(tmp_path):
    step = {"program": "aligning step, ESD", "fsdp": True, "remat": False, "bytes": 10**10, "reason": ""}
    write(tmp_path, "tpu-v5e-4", programs=[step | {"limit_bytes": 15_200_000_000, "fits": True}])
    write(tmp_path, "a6000", programs=[step | {"fsdp": False, "limit_bytes": 5 * 10**9, "fits": False}])
    lines = targets.aligning_table(tmp_path, "SD1.5", ["h100", "tpu-v5e-4", "a6000"]).splitlines()
    assert lines[0] == "SD1.5, GB on a device:" and lines[2] == "| aligning step | tpu-v5e-4 | a6000 |"
    assert lines[4:] == ["| ESD | 10 of 15.2 (split) | 10 of 5, does not fit |"]
    write(tmp_path, "h100")
    assert not targets.aligning_table(tmp_path, "SD1.5", ["h100"])


def test_the_device_hours_of_a_card_without_a_peak(tmp_path):
    write(tmp_path, "a6000", hours={"device_hours": None}, fits=False)
    assert targets.table(tmp_path, "SD1.5", ["a6000"]).splitlines()[-1].endswith("| - | no |")


def test_a_cell_that_cannot_be_asked_says_why(tmp_path, capfd):
    """Without a compiler for the target, or with another mistake: the last line of the command is kept."""
    targets.main(["--out", str(tmp_path), "--models", "emoji", "--targets", "cpu", "--", "--share", "0"])
    shown = capfd.readouterr().out.splitlines()[-1]
    assert "share" in shown and shown.endswith("not known |") and (tmp_path / "emoji_cpu.txt").exists()


@pytest.mark.parametrize("wrong", [["--models", "SD9"], ["--targets", "tpu-v9"]])
def test_what_is_unknown_is_answered_with_the_list(tmp_path, capsys, wrong):
    with pytest.raises(SystemExit):
        targets.main(["--out", str(tmp_path), *wrong])
    assert "expected some of" in capsys.readouterr().err
