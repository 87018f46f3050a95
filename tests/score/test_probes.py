"""Scores of probes from invented records: shares and CLIPScores by hand, paired with the control, and what stops."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spqr_jax.score import probes
from tests.score.invented import PROMPTS, make_probe


@pytest.fixture
def workdir(tmp_path):
    make_probe(tmp_path, "Control", 2, 0.8)
    make_probe(tmp_path, "Erased", 10, 0.5)
    return tmp_path


def test_figures_and_their_distance_to_the_control(workdir):
    control, erased = probes.build(workdir)["rows"]
    assert (control["subject"], control["n"], control["seeds"]) == ("Control", PROMPTS, [0])
    assert control["dunsafe"] is None and control["dclip"] is None and control["dclip_ci"] is None
    assert (control["unsafe"], erased["unsafe"], erased["dunsafe"]) == (5.0, 25.0, 20.0)
    assert erased["clip"] == pytest.approx(0.505) and erased["dclip"] == pytest.approx(-0.3)
    for figure in probes.FIGURES:
        low, high = erased[f"{figure}_ci"]
        assert low <= erased[figure] <= high
    assert erased["dunsafe_ci"][0] > 0 and np.ptp(erased["dclip_ci"]) < 1e-9 < np.ptp(erased["clip_ci"])


def test_nothing_unsafe_is_no_certainty(tmp_path):
    make_probe(tmp_path, "Control", 0, 0.8)
    make_probe(tmp_path, "Erased", 0, 0.8)
    control, erased = probes.build(tmp_path)["rows"]
    assert control["unsafe"] == 0 and control["unsafe_ci"][1] > 5
    assert erased["dunsafe"] == 0 and erased["dunsafe_ci"][0] < -3 and erased["dunsafe_ci"][1] > 3


def test_seeds_after_fine_tuning_are_one_row_with_a_wider_interval(workdir):
    for seed, unsafe in ((0, 4), (1, 20)):
        make_probe(workdir, "Erased", unsafe, 0.5, phase="after", seed=seed)
    rows = probes.build(workdir)["rows"]
    after = rows[-1]
    assert [row["phase"] for row in rows] == ["before", "before", "after"]
    assert (after["profile"], after["seeds"], after["unsafe"], after["n"]) == ("lite", [0, 1], 30.0, PROMPTS)
    assert np.ptp(after["unsafe_ci"]) > 1.5 * np.ptp(rows[1]["unsafe_ci"])
    assert after["dunsafe"] is None, "there is no control after fine-tuning"


def test_undecided_images_belong_to_neither_side(workdir):
    folder = make_probe(workdir, "Other", 4, 0.5)
    rows = pq.read_table(folder / "records.parquet").to_pylist()
    rows = [
        row | {"clip_score": float("nan")} | ({"verdict": "undecided"} if i >= 20 else {}) for i, row in enumerate(rows)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "records.parquet")
    other = probes.build(workdir)["rows"][-1]
    assert (other["unsafe"], other["undecided"], other["clip"], other["dclip"]) == (20.0, 20, None, None)


def test_files_and_text_are_the_same_every_time(workdir):
    assert probes.build(workdir / "nothing") is None
    found = probes.build(workdir, replicates=100)
    probes.write(workdir, found)
    first = [(workdir / f"probes.{suffix}").read_bytes() for suffix in ("json", "csv")]
    probes.write(workdir, probes.build(workdir, replicates=100))
    assert [(workdir / f"probes.{suffix}").read_bytes() for suffix in ("json", "csv")] == first
    assert first[1].decode().splitlines()[2].startswith("Erased,False,before,,,Alike,benign,0,25.0,")
    assert "Alike: before" in probes.text(found) and "Erased" in probes.text(found)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"text": "other"}, "Alike-Control-before-0 and Alike-Other-before-0 have different prompts"),
        ({"judges": {"strict": {"sha256": "2"}}}, "judge 'strict' is not the same"),
    ],
)
def test_what_does_not_compare_stops(workdir, change, says):
    make_probe(workdir, "Other", 4, 0.5, **change)
    with pytest.raises(ValueError, match=says):
        probes.build(workdir)


def test_one_probe_twice_stops(workdir):
    folder = make_probe(workdir, "Erased", 4, 0.5, seed=1)
    (folder / "probe.json").write_text(json.dumps(json.loads((folder / "probe.json").read_text()) | {"seed": 0}))
    with pytest.raises(ValueError, match="are the same on the same model"):
        probes.build(workdir)
