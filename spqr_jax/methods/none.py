"""No alignment: the control every method is compared with."""

from spqr_jax.concepts import Concept
from spqr_jax.methods.base import Method
from spqr_jax.pipeline import Pipeline


def align(pipeline: Pipeline, concept: Concept, *, seed: int = 0, progress: bool = False) -> Pipeline:
    """The pipeline as it is. `seed` and `progress` are accepted as by every method, and not used."""
    del concept, seed, progress
    return pipeline


METHOD = Method("none", "No alignment", align)
