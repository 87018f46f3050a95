"""Images made again: invented answers are found, though every number of their bundle fits the others."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest

from spqr_jax.prompts import Prompt
from spqr_jax.submission import bundle as bundle_lib
from spqr_jax.submission import pack, rerun, stated, verify
from spqr_jax.submission.rerun import Asked
from tests.submission import invented


@pytest.fixture(scope="module")
def read(made):
    return bundle_lib.read(made / "bundle")


def test_a_share_of_the_prompts_is_drawn_by_its_seed():
    prompts = {role: [Prompt(str(i), "") for i in range(20)] for role in ("harmful", "benign")}
    run = SimpleNamespace(prompts=prompts)
    drawn = rerun.drawn(run, 0.25, seed=1)
    assert drawn == rerun.drawn(run, 0.25, seed=1) != rerun.drawn(run, 0.25, seed=2)
    for role, rows in drawn.items():
        assert len(rows) == 5 and rows == [row for row in prompts[role] if row in rows]
    assert [len(rows) for rows in rerun.drawn(run, 0.001, seed=1).values()] == [1, 1]


def test_paths_may_be_others_here(read):
    config = stated.config_of(read.manifest)
    changed = rerun.changed(config, {"base": "models/mini", "judges.safety.harm": "judges/harm.onnx"})
    assert changed.base == "models/mini" and changed.judges.safety == {"harm": "judges/harm.onnx"}
    for field in ("bass", "bft.lr", "judges.safety.other", "prompts"):
        with pytest.raises(ValueError, match=f"--set {field}: the config has no such field"):
            rerun.changed(config, {field: "x"})


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, float("nan")])
def test_a_share_is_above_zero_and_at_most_one(read, tmp_path, share):
    with pytest.raises(ValueError, match="expected a share above 0"):
        rerun.check(read, tmp_path, Asked(share))


def test_code_of_others_runs_only_where_it_is_allowed(read, tmp_path):
    config = read.manifest["config"]
    subjects = [config["subjects"][0] | {"method": "a_lab.align"}]
    changed = read._replace(manifest=read.manifest | {"config": config | {"subjects": subjects}})
    with pytest.raises(ValueError, match=r"method a_lab\.align is code of another package: allow it"):
        rerun.check(changed, tmp_path, Asked(0.5))


def test_other_settings_are_found_before_the_first_image(read, tmp_path):
    config = read.manifest["config"]
    other = config | {"generation": config["generation"] | {"scheduler": "ddim"}}
    changed = read._replace(manifest=read.manifest | {"config": other})
    found = rerun.check(changed, tmp_path, Asked(0.5))
    assert found.images == 0 and "the files at hand give this id" in found.faults[0]
    assert not list(Path(tmp_path).rglob("*.png"))


@pytest.mark.slow
def test_invented_answers_are_found_and_real_ones_are_not(tmp_path):
    """Both bundles are verified; only the images tell them apart."""
    config = invented.config(subjects=("No alignment",), n_harmful=8, n_benign=4)
    folder = invented.bundle(tmp_path, config)
    assert verify.check(folder).verified
    made_up = bundle_lib.read(folder)
    found = rerun.check(made_up, tmp_path / "again", Asked(1.0))
    assert "verdicts differ, more than the share of 0.02 that may" in found.faults[0]
    run = rerun.opening.open_run(dataclasses.replace(config), tmp_path / "again")
    rerun.stages.carry_out(run, {"score"})
    invented.manifest.write_manifest(run, ["launch.py"])
    real = pack.of_run(tmp_path / "again")
    assert verify.check(bundle_lib.write(real, tmp_path / "real")).verified
    again = rerun.check(real, tmp_path / "third", Asked(0.5, seed=1))
    assert again.images == 12 and not again.faults
