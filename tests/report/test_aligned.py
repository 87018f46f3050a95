"""What aligning did before any fine-tuning: the figures are those of the pictures, and what does not compare stops."""

import json

import numpy as np
import pytest

from spqr_jax import score
from spqr_jax.files import records
from spqr_jax.report import aligned
from spqr_jax.report.__main__ import main

PROMPTS, BENIGN, IMAGES = 40, 30, 2
RNG = np.random.default_rng(0)
REFERENCE = RNG.normal(size=(200, 3)).astype(np.float32)


def subject(run, name, *, unsafe, clip, folder=None, judge="1", texts="prompt"):
    """A judged subject: `unsafe` harmful prompts have unsafe pictures, benign ones a mean similarity `clip`."""
    root = run / "subjects" / (folder or name.lower())
    root.mkdir(parents=True)
    common = dict.fromkeys(records.IMAGES.schema.names, "") | {"seed": 0, "image_seed": 0}
    common |= {"subject": name, "phase": "before"}
    rows = [
        common
        | {"role": "harmful", "prompt_set": "set", "prompt_id": str(i), "k": k, "prompt": f"{texts} {i}"}
        | {"verdict": "unsafe" if i < unsafe else "safe", "clip_score": float("nan")}
        for i in range(PROMPTS)
        for k in range(IMAGES)
    ]
    rows += [
        common
        | {"role": "benign", "prompt_set": "set", "prompt_id": str(i), "k": k, "prompt": f"{texts} {i}"}
        | {"verdict": "safe", "clip_score": clip + 0.001 * (i % 3 - 1)}
        for i in range(BENIGN)
        for k in range(IMAGES)
    ]
    records.write(root / "records.parquet", rows)
    features = np.random.default_rng(unsafe).normal(size=(BENIGN * IMAGES, 3)).astype(np.float32)
    np.savez(root / "features_before.npz", features=features)
    (root / "judges.json").write_text(json.dumps({"judges": {"harm": judge}, "rule": "union"}))
    return features


def manifest(run, *names):
    subjects = [{"name": n, "method": "none" if n == "Control" else "esd", "checkpoint": ""} for n in names]
    (run / "manifest.json").write_text(json.dumps({"config": {"subjects": subjects}}))


@pytest.fixture
def run(tmp_path):
    subject(tmp_path, "Control", unsafe=36, clip=0.8)
    np.savez(tmp_path / "reference_features.npz", features=REFERENCE)
    manifest(tmp_path, "Control")
    return tmp_path


def test_figures_beside_the_control(run):
    features = subject(run, "Good", unsafe=9, clip=0.79)
    subject(run, "Blunt", unsafe=1, clip=0.4)
    subject(run, "Idle", unsafe=36, clip=0.8)
    table = aligned.build(run)
    rows = {row[0]: row for row in table.rows}
    assert list(rows) == ["Control", "Blunt", "Good", "Idle"]  # the control, then by h
    _, h, harm, clip, kept, fid, job = rows["Good"]
    assert (h.value, harm.value) == (22.5, 25.0) and clip.value == pytest.approx(0.79, abs=1e-9)
    assert kept.value == pytest.approx(100 * 0.79 / 0.8)
    assert fid.value == pytest.approx(score.frechet_distance(features, REFERENCE), rel=1e-6)
    assert all(f.low < f.value < f.high for f in (h, harm, clip, kept, fid)) and job == "yes"
    assert rows["Blunt"][-1] == "no" and rows["Idle"][-1] == "no" and rows["Control"][-1] == ""
    assert rows["Idle"][2].low < 100 < rows["Idle"][2].high


def test_a_limit_within_the_interval_is_marked(run):
    subject(run, "Nearly", unsafe=19, clip=0.79)  # 52.8% of the control's h, on 40 prompts
    assert aligned.build(run).rows[1][-1] == "no?"


def test_the_command_prints_markdown_and_takes_another_control(run, capsys):
    subject(run, "Good", unsafe=9, clip=0.79)
    assert main(["aligned", str(run)]) == 0
    assert "| Good | 22.5 [" in capsys.readouterr().out
    assert main(["aligned", str(run), "--control", "Good"]) == 0
    assert "| Good | 22.5 [" in capsys.readouterr().out.splitlines()[4]


def test_without_a_reference_there_is_no_fid(run):
    (run / "reference_features.npz").unlink()
    assert aligned.build(run).rows[0][5] == "n/a"


def test_what_does_not_compare_stops(run, tmp_path_factory, capsys):
    empty = tmp_path_factory.mktemp("empty")
    assert main(["aligned", str(empty)]) == 1
    assert "run --stages align,generate,judge first" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"'Else' is not a judged subject; --control NAME, one of \['Control'\]"):
        aligned.build(run, control="Else")
    subject(run, "Control", unsafe=1, clip=0.4, folder="control-2")
    with pytest.raises(ValueError, match="'Control' with two settings"):
        aligned.build(run)


@pytest.mark.parametrize(
    ("options", "message"), [({"judge": "2"}, "different judges"), ({"texts": "else"}, "different prompts")]
)
def test_other_judges_or_prompts_stop(run, options, message):
    subject(run, "Other", unsafe=9, clip=0.79, **options)
    with pytest.raises(ValueError, match=message):
        aligned.build(run)


def test_a_manifest_without_one_control_asks_for_it(run):
    manifest(run, "Good")
    with pytest.raises(ValueError, match=r"0 controls in the config of manifest\.json; name one by --control"):
        aligned.build(run)
