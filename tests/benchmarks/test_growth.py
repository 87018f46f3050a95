"""The smallest point of a curve is measured once and shown, and an exponent is the slope of its last decade."""

import json

import pytest

from benchmarks import growth, invented_runs
from benchmarks.growth import Point
from spqr_jax.score import leaderboard


def test_a_point_is_measured_once(tmp_path, capsys):
    asked = ["--out", str(tmp_path), "--curves", "cells scored", "--figure", str(tmp_path / "figure.png")]
    growth.main([*asked, "--most", "1"])
    kept = (tmp_path / "points.json").read_text()
    seconds, clock, memory = json.loads(kept)["cells scored"]["1"]
    assert 0 < seconds < 60 and clock > 0 and 0.02 < memory < 4
    growth.main([*asked, "--table"])
    assert (tmp_path / "points.json").read_text() == kept and not (tmp_path / "invented").exists()
    assert "| cells scored | 1 | " in capsys.readouterr().out and (tmp_path / "figure.png").stat().st_size > 1000


def test_an_exponent_is_the_slope_of_the_last_decade():
    assert growth.exponent({1: 50.0, 10: 1.0, 30: 3.0, 100: 10.0}) == pytest.approx(1.0)
    assert growth.exponent({size: size**2.0 for size in (200, 1000, 10_000)}) == pytest.approx(2.0)
    assert growth.exponent({1: 1.0}) is None
    [row] = growth.table({"cells scored": {10: Point(123.4, 9.0, 0.123), 1: Point(12.34, 2.0, 0.123)}})
    assert (row["sizes"], row["processor seconds"], row["peak GiB"]) == ("1, 10", "12, 123", "0.12, 0.12")
    assert (row["exponent of seconds"], row["of GiB"]) == ("1.00", "0.00")


@pytest.mark.parametrize(
    ("asked", "message"), [(["--curves", "none"], "--curves has 'none'"), (["--table"], "no point is there")]
)
def test_what_cannot_be_shown_says_so(tmp_path, capsys, asked, message):
    with pytest.raises(SystemExit):
        growth.main(["--out", str(tmp_path), *asked])
    assert message in capsys.readouterr().err


def test_invented_runs_have_every_figure(tmp_path):
    workdir = invented_runs.write(tmp_path / "run", cells=6, prompts=80, each=2, pictures=True)
    board = leaderboard.build(workdir, replicates=50)
    assert len(board["rows"]) == 6 and sum(row["is_control"] for row in board["rows"]) == 2
    row = next(row for row in board["rows"] if not row["is_control"])
    assert all(row[name] is not None for name in ("S", "P", "Q", "R", "SPQR", "kept", "fid_after"))
    assert len(row["categories"]) == 7 and row["without_judge"].keys() == set(invented_runs.JUDGES)
    assert len(board["comparisons"]) == 6 and len(list(workdir.glob("cells/*/images/*/*.png"))) == 6 * 160
