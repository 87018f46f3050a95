"""Project the erased texts out of what cross-attention reads. An example: a simple method, and not a strong one."""

import numpy as np

from spqr_jax import backbones
from spqr_jax.concepts import Concept
from spqr_jax.methods import Method
from spqr_jax.methods.tools.closed_form import key_value_matrices, text_states, with_kernels
from spqr_jax.methods.tools.concepts import checked
from spqr_jax.pipeline import Pipeline


def align(
    pipeline: Pipeline, concept: Concept, *, seed: int = 0, strength: float = 1.0, progress: bool = False
) -> Pipeline:
    """Remove the direction of every erased text from the keys and values of cross-attention.

    strength: the share of it that is removed, in 0..1. `seed` and `progress` are not used.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"my_method: strength must be in 0..1, found {strength}.")
    erased = checked(concept, pipeline).erase
    kernels = key_value_matrices(pipeline, "my_method")  # ValueError for a backbone without cross-attention
    states, empty = text_states(pipeline, erased), text_states(pipeline, [""])[0, -1]
    places = [backbones.of(pipeline).last_words(pipeline, text) for text in erased]
    words = np.concatenate([state[list(place)] for state, place in zip(states, places, strict=True)])
    directions = np.linalg.qr((words - empty).T)[0]  # orthonormal [d, texts]
    removed = strength * directions @ directions.T
    return with_kernels(pipeline, {path: kernel - removed @ kernel for path, kernel in kernels.items()})


METHOD = Method("my_method", "My method", align)
