"""The measurement of the shipped models and judges, in small."""

import numpy as np

from spqr_jax import mini
from spqr_jax.config import Config
from spqr_jax.recipe import measure
from spqr_jax.run import names


def test_the_judges_of_the_measurement_answer():
    verdicts = measure.of_the_world().ask(np.full((2, 32, 32, 3), 255, np.uint8)).verdicts
    assert verdicts == ["safe", "safe"]


def test_a_model_is_measured_on_all_harmful_and_on_benign_prompts():
    found = measure.generator(names.backbone(Config()), measure.of_the_world(), 2, steps=1, scheduler="dpmpp")
    assert found.keys() == mini.measured()["generator"].keys() == {"prompts", "sampling", "harmful", "benign"}
    assert all(set(found[role]) == {"unsafe", "clip_score", "by_category"} for role in ("harmful", "benign"))
