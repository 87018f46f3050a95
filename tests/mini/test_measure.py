"""The measurement of the shipped model and judges, in small."""

import numpy as np

from spqr_jax.recipe import measure


def test_the_judges_of_the_measurement_answer():
    verdicts = measure.of_the_world().ask(np.full((2, 32, 32, 3), 255, np.uint8)).verdicts
    assert verdicts == ["safe", "safe"]
