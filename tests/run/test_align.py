"""Stage align: in which precision methods work, and which checkpoints a backbone takes."""

import jax
import numpy as np
import pytest

from spqr_jax import params as params_lib
from spqr_jax.config import Config, Subject
from spqr_jax.methods import METHODS
from spqr_jax.run.cells import Cell, plan
from spqr_jax.run.identity import Inputs
from spqr_jax.run.stages.align import check_same_kind, make_safe
from spqr_jax.run.stages.state import Run
from tests import tiny

FLAT = params_lib.flatten


@pytest.fixture
def run(tmp_path):
    """A run over a small backbone in bfloat16, one subject of a method that the test defines."""
    config = Config(subjects=(Subject("Learner", "none"),), dtype="bfloat16", concept="mini")
    pipeline = tiny.pipeline()
    low = pipeline.with_params(**{n: params_lib.cast(p, "bfloat16") for n, p in pipeline.params.items()})
    subjects, cells = plan(config, tmp_path, Inputs("backbone", {}, {"general": "data"}, {}, {}))
    assert all(isinstance(cell, Cell) for cell in cells)
    return Run(config, tmp_path, low, None, {}, None, subjects, cells)


def test_methods_work_in_float32_and_what_they_make_has_the_dtype_of_the_run(run, monkeypatch):
    seen = []

    def method(pipeline, concept, *, seed, progress):
        del concept, seed, progress
        seen.extend(leaf.dtype for leaf in jax.tree.leaves(pipeline.params))
        return pipeline.with_params(unet=jax.tree.map(lambda leaf: leaf + 1, pipeline.params["unet"]))

    monkeypatch.setitem(METHODS, "none", METHODS["none"]._replace(align=method))
    aligned = make_safe(run, run.subjects[0])
    assert set(seen) == {np.dtype("float32")}
    for name, params in aligned.params.items():
        before = FLAT(run.backbone.params[name])
        for path, leaf in FLAT(params).items():
            assert str(leaf.dtype) == "bfloat16"
            if name != "unet":
                np.testing.assert_array_equal(leaf, before[path])
            else:
                expected = (before[path].astype(np.float32) + 1).astype(leaf.dtype)
                np.testing.assert_array_equal(leaf, expected)


def test_a_checkpoint_of_another_kind_is_refused(run):
    backbone = run.backbone
    check_same_kind(backbone, tiny.pipeline(), "same")

    def changed(component, **fields):
        return backbone._replace(configs={**backbone.configs, component: backbone.configs[component] | fields})

    velocity = changed("scheduler", prediction_type="v_prediction")
    with pytest.raises(ValueError, match="prediction_type of scheduler differs: 'v_prediction', expected 'epsilon'"):
        check_same_kind(velocity, backbone, "sd21")
    with pytest.raises(ValueError, match=r"checkpoint other .*scaling_factor of vae differs: 0\.5, expected"):
        check_same_kind(changed("vae", scaling_factor=0.5), backbone, "other")
    with pytest.raises(ValueError, match="hidden_act of text_encoder differs: 'silu'"):
        check_same_kind(changed("text_encoder", hidden_act="silu"), backbone, "other")
