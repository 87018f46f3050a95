"""Attacks in a report: a table and a figure of what they reached, and nothing of what they found."""

import pytest

from spqr_jax.report import figures, tables, tabular
from spqr_jax.report import write as write_report
from spqr_jax.report.reading import read
from spqr_jax.score import attacks, leaderboard
from tests.score.invented import make_attempt, make_cell

N = 20
SECRET = "a learned prompt of nobody"


@pytest.fixture
def workdir(tmp_path):
    """Two scored subjects under two attacks, one of them transferred, whose finds lie beside their records."""
    for subject, held in (("Erased", 16), ("No alignment", 4)):
        cell = make_cell(tmp_path, subject, before=2, after=8, control=subject == "No alignment")
        for attack, transfer in (("A", False), ("B", True)):
            for one, lost in ((None, 0), (cell, 4)):
                broken = [int(i >= held - lost) for i in range(N)]
                folder = make_attempt(tmp_path, attack, subject, broken, cell=one, transfer=transfer)
                (folder / "found.npz").write_text(SECRET)
    leaderboard.write(tmp_path, leaderboard.build(tmp_path, replicates=100))
    attacks.write(tmp_path, attacks.build(tmp_path, replicates=100))
    return tmp_path


def test_the_table(workdir):
    logistic, exponential = tables.build(read(workdir), ["attacks"])
    assert (logistic.name, exponential.name) == ("attacks", "attacks_exponential")
    assert all(len(row) == len(logistic.columns) for row in logistic.rows)
    lines = {(row[0], row[3]): dict(zip(logistic.columns, row, strict=True)) for row in logistic.rows}
    assert len(lines) == 2 * 4
    row = lines["Erased", "A"]
    assert (row["Made on"], row["Prompts"], row["Undecided"]) == ("itself", "20", "0+0")
    assert [row[c].value for c in ("Broken before, %", "after, %", "Rise, points", "S")] == [20, 40, 20, 0.8]
    assert tabular.cell_text(row["Rise, points"]).startswith("+20.0 [")
    assert row["Reopened, %"].value == 25 and row["by fine-tuning alone, %"].value == 50
    assert lines["Erased", "B"]["Made on"] == "unaligned model"
    assert lines["Erased", "no attack"]["by fine-tuning alone, %"].value is None


def test_the_figure(workdir, tmp_path):
    files = figures.write(read(workdir), tmp_path / "figures", ["attacks"])
    assert [file.name for file in files] == ["attack_robustness.svg", "attack_robustness.png"]
    again = figures.write(read(workdir), tmp_path / "again", ["attacks"])
    assert [file.read_bytes() for file in files] == [file.read_bytes() for file in again]


def test_a_report_holds_nothing_that_an_attack_found(workdir):
    write_report(workdir)
    files = [file for file in (workdir / "report").rglob("*") if file.is_file()]
    assert (workdir / "report" / "tables" / "attacks.md") in files
    assert "any attack" in (workdir / "report" / "index.html").read_text()
    assert not [file for file in files if SECRET.encode() in file.read_bytes()]


def test_a_run_without_attacks_has_neither_table_nor_figure(tmp_path):
    make_cell(tmp_path, "Erased", before=2, after=8)
    leaderboard.write(tmp_path, leaderboard.build(tmp_path, replicates=100))
    run = read(tmp_path)
    assert tables.build(run, ["attacks"]) == [] and figures.write(run, tmp_path / "figures", ["attacks"]) == []


def test_runs_read_together_keep_their_attacks_apart(workdir, tmp_path):
    other = tmp_path / "other"
    make_cell(other, "Erased", before=2, after=8)
    leaderboard.write(other, leaderboard.build(other, replicates=100))
    rows = read(workdir, other).attacked
    assert len(rows) == 8 and all(" · " in row["subject"] for row in rows)


def test_an_attacks_json_that_cannot_be_read_is_a_gap(workdir):
    (workdir / "attacks.json").write_text("{")
    run = read(workdir)
    assert run.attacked == [] and any("attacks.json: cannot be read" in gap for gap in run.gaps)
