"""The judge stage beside training."""

import jax
import pytest

from spqr_jax import finetune
from spqr_jax import params as params_lib
from spqr_jax.config import Config
from spqr_jax.profiles import PROFILES
from spqr_jax.run import protocol
from spqr_jax.run.stages.judge import trained_size
from tests import tiny


@pytest.mark.parametrize("profile", PROFILES)
def test_size_of_a_profile_is_found_without_the_devices(profile):
    """Judges have a thread of their own: XLA once never returned from an operation of theirs beside a training step."""
    pipeline, config = tiny.pipeline(), protocol.resolve(Config())
    with jax.transfer_guard("disallow"):
        found = trained_size(pipeline, profile, config)
    _, trainable, _, _ = finetune.prepare(pipeline, profile, rank=8, alpha=16.0, dropout=0.1, seed=0)
    parameters = params_lib.count(trainable)
    assert found == {
        "trained_parameters": parameters,
        "parameter_bytes": 4 * parameters,
        "optimiser_bytes": 2 * 4 * parameters,
    }
