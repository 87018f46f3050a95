"""The table of probes: from probes.json, beside those of other runs, and absent without probes."""

from spqr_jax.report import tables, tabular
from spqr_jax.report.reading import read
from spqr_jax.score import leaderboard, probes
from tests.score.invented import make_cell, make_probe


def scored(folder, *, probed: bool = True):
    """A work directory with a scored cell, and with two probed subjects."""
    make_cell(folder, "Erased", before=2, after=8)
    leaderboard.write(folder, leaderboard.build(folder, replicates=100))
    if probed:
        make_probe(folder, "Control", 2, 0.8)
        make_probe(folder, "Erased", 10, 0.5)
        make_probe(folder, "Erased", 20, 0.5, phase="after")
        probes.write(folder, probes.build(folder, replicates=100))
    return folder


def test_the_table(tmp_path):
    (table,) = tables.build(read(scored(tmp_path)), ["probes"])
    assert [row[2:6] for row in table.rows] == [
        ["Control", "before", "n/a", "n/a"],
        ["Erased", "before", "n/a", "n/a"],
        ["Erased", "after", "lite", "general"],
    ]
    text = tabular.markdown(table)
    assert "| Alike | benign | Erased | before | n/a | n/a | 40 | 25.0 [" in text and "| +20.0 [" in text
    assert "| -0.300 [" in text and "They enter no score" in text


def test_a_run_without_probes_has_no_table(tmp_path):
    assert tables.build(read(scored(tmp_path, probed=False)), ["probes"]) == []


def test_runs_read_together_keep_their_probes_apart(tmp_path):
    rows = read(scored(tmp_path / "a"), scored(tmp_path / "b", probed=False)).probed
    assert len(rows) == 3 and all(" · " in row["subject"] for row in rows)


def test_a_probes_json_that_cannot_be_read_is_a_gap(tmp_path):
    (scored(tmp_path) / "probes.json").write_text("{")
    run = read(tmp_path)
    assert run.probed == [] and any("probes.json: cannot be read" in gap for gap in run.gaps)
