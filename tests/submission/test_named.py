"""What verification knows without the files of a run: settings that no run begins with, the emoji world, and judges."""

import json

import numpy as np
import pytest

from judges import recorded
from judges.nudenet import NudeNet
from judges.nudenet_v2 import NudeNetV2
from spqr_jax.files import records
from spqr_jax.submission import named
from tests.submission import invented
from tests.submission.test_verify import faults, table, with_config

WEIGHTS = "sha256 of the weights mini is 000000000000, this package ships others"


def judged(read, tmp_path, kind, edit):
    """The faults of a bundle with the identity of a judge edited, in the manifest and in every cell."""
    judges = json.loads(json.dumps(read.manifest["judges"]))
    edit(judges[kind])
    cells = tuple(c._replace(info=c.info | {"judges": judges}) for c in read.cells)
    return faults(read._replace(manifest=read.manifest | {"judges": judges}, cells=cells), tmp_path, rescored=False)


def test_the_emoji_world_is_known_by_its_files(read, tmp_path):
    inputs = read.manifest["sha256"]
    other = read._replace(manifest=read.manifest | {"sha256": inputs | {"backbone": "0" * 64}})
    assert WEIGHTS in faults(other, tmp_path)
    other = read._replace(manifest=read.manifest | {"sha256": inputs | {"data": {"general": "mini:general 5000 42"}}})
    assert "sha256.data.general is mini:general 5000 42, expected mini:general 200 0" in faults(other, tmp_path)
    for kind in ("harm", "clip_score", "features"):
        text = judged(read, tmp_path, kind, lambda identity: identity.update(model="mine"))
        assert f"judges.{kind}: it is not the judge that mini:" in text
    assert "judge mini:cli~ is unknown" in faults(with_config(read, "judges", clip_score="mini:cli~"), tmp_path)


def test_where_judges_ran_is_said_once(read, tmp_path):
    text = judged(read, tmp_path, "harm", lambda identity: identity.update(provider="CUDAExecutionProvider"))
    assert "judges.harm: it ran on ['CUDAExecutionProvider'], the config says CPUExecutionProvider" in text


@pytest.mark.parametrize(
    ("section", "values", "reason"),
    [
        ("judges", {"max_undecided": 1.5}, "config.judges.max_undecided=1.5 is outside 0..1"),
        ("mesh", {"cpu_devices": 0}, "config.mesh.cpu_devices=0 is too small"),
        ("report", {"tables": ["9"]}, "9"),
        ("generation", {"scheduler": "dpm++"}, "config.generation.scheduler='dpm++' is unknown"),
    ],
)
def test_no_run_begins_with_other_settings(read, tmp_path, section, values, reason):
    text = faults(with_config(read, section, **values), tmp_path, rescored=False)
    assert text.startswith("manifest.json: ") and reason in text


def test_an_option_that_a_method_lacks(read, tmp_path):
    config = json.loads(json.dumps(read.manifest["config"]))
    config["subjects"][1]["options"] = {"strength": 2.0}
    assert "'strength' is unknown" in faults(read._replace(manifest=read.manifest | {"config": config}), tmp_path)


def of_judge(source: str, identity: dict) -> list[str]:
    """The faults of a manifest whose one safety judge has this source and identity."""
    config = invented.config()
    config.judges.safety = {"nude": source}
    return list(named.judges_faults({"judges": invented.identities() | {"nude": identity}}, config, shipped=True))


def test_a_judge_is_of_the_kind_and_has_the_options_that_the_config_says():
    strict, second = NudeNet.open().identity, NudeNetV2.open(threshold=0.6).identity
    assert of_judge("nudenet:strict5", strict) == of_judge("nudenet:v2?threshold=0.6", second) == []
    assert of_judge("nudenet:v2", strict) == ["judges.nude: it is of kind 'nudenet', the config names 'nudenet:v2'"]
    assert of_judge("nudenet:broad9", strict) == ["judges.nude: label_set is 'strict5', the config says 'broad9'"]
    assert of_judge("nudenet:v2?threshold=0.7", second) == ["judges.nude: threshold is 0.6, the config says 0.7"]
    assert "no option 'strength'" in of_judge("nudenet:v2?strength=0.7", second)[0]
    assert of_judge("somebody.Elses", {"judge": "theirs", "plugin": "x", "provider": "NPU"}) == []
    assert recorded.providers([{"text": {"provider": "a"}}, {"provider": "b"}]) == {"a", "b"}


def test_a_run_is_not_complete_with_too_many_undecided(read, tmp_path):
    def failed(rows):
        none = json.dumps({"harm": {"labels": {}, "reason": "broken", "score": None, "verdict": "undecided"}})
        return [row | ({"judges": none, "verdict": "undecided"} if row["phase"] == "after" else {}) for row in rows]

    cell = read.cells[0]
    info = cell.info | {"n_undecided": 12}
    cells = (cell._replace(info=info, records=table(failed(cell.records.to_pylist()))), *read.cells[1:])
    text = faults(read._replace(cells=cells), tmp_path, rescored=False)
    assert "12 images after are undecided, more than judges.max_undecided allows" in text


def test_harm_at_the_first_step_is_that_of_the_images_before(read, tmp_path):
    rows = read.cells[0].drift.to_pylist()
    assert {row["step"] for row in rows} == {0, invented.DRIFT_AT}
    rows[0]["verdict"] = {"safe": "unsafe", "unsafe": "safe"}[rows[0]["verdict"]]
    cells = (read.cells[0]._replace(drift=table(rows, records.DRIFT)), *read.cells[1:])
    text = faults(read._replace(cells=cells), tmp_path, rescored=False)
    assert "1 of 8 verdicts at step 0 are others than those of the images before" in text


def test_a_profile_with_fewer_steps_has_a_shorter_curve(read, tmp_path):
    """Steps of `bft.eval_at` that a profile does not reach are in no curve of its cells."""
    reached, beyond = (with_config(read, "bft", eval_at=[invented.DRIFT_AT, last]) for last in (13, 14))
    assert "24 images" not in faults(beyond, tmp_path) and "drift.parquet" not in faults(beyond, tmp_path)
    assert "drift.parquet: 16 images, the config asks for 24" in faults(reached, tmp_path)


def test_a_profile_that_nobody_knows(read, tmp_path):
    cell = read.cells[0]
    changed = read._replace(cells=(cell._replace(info=cell.info | {"profile": "heavy"}), *read.cells[1:]))
    assert "x heavy x general x seed 1 is not named by the config" in faults(changed, tmp_path, rescored=False)


def test_cells_of_a_profile_train_the_same(read, tmp_path):
    cell = read.cells[0]
    info = cell.info | {"finetune": cell.info["finetune"] | {"trained_parameters": 1001}}
    text = faults(read._replace(cells=(cell._replace(info=info), *read.cells[1:])), tmp_path, rescored=False)
    assert "finetune has other sizes than other cells under this profile" in text


def test_the_reference_images_are_those_that_the_config_names(read, tmp_path):
    network, _ = json.loads(str(read.reference["identity"]))
    other = read.reference | {"identity": np.array(json.dumps([network, "mini:reference 1000"]))}
    text = faults(read._replace(reference=other), tmp_path, rescored=False)
    assert "its images are mini:reference 1000, the config names mini:reference 64" in text
