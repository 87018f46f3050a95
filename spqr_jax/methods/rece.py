"""RECE (Gong et al., ECCV 2024): UCE, then repeatedly find the embeddings that revive the concept, and erase those."""

import numpy as np

from spqr_jax.concepts import Concept
from spqr_jax.methods import uce
from spqr_jax.methods.base import Method
from spqr_jax.methods.tools.closed_form import Edit, key_value_matrices, solve, text_states, with_kernels
from spqr_jax.methods.tools.concepts import checked, expanded
from spqr_jax.pipeline import Pipeline


def align(
    pipeline: Pipeline,
    concept: Concept,
    *,
    seed: int = 0,
    epochs: int = 3,
    embedding_ridge: float = 0.1,
    ridge: float = 0.1,
    preserve_scale: float = 0.1,
    start: str = "v1",
    start_options: dict | None = None,
    expand: bool = False,
    progress: bool = False,
) -> Pipeline:
    """Start from UCE (`start` variant) and run `epochs` rounds (authors: 3 for nudity, 2 for the eleven-word list).

    Each round solves for c', the embedding whose *edited* keys and values are nearest to the *original* response to the
    concept: c' = (embedding_ridge I + sum W^T W)^-1 (sum W^T W0) c, then edits every matrix so that c' gives the
    target's output, keeping the target itself and the concept's preserve set (`preserve_scale`) and staying near the
    matrices of the round before (`ridge`). start_options: further options of UCE. expand: also erase the texts within
    the concept's templates (`tools.concepts.expanded`), from the start on. The authors' script keeps a round only when
    its detector's rate on a validation list falls; here all rounds are kept, since a method must not see the judges. It
    runs on SDXL too, for which the authors have no code. Nothing is random: `seed` is accepted as by every method, and
    not used.
    """
    del progress
    concept = expanded(concept, pipeline) if expand else checked(concept, pipeline)
    METHOD.check_backbone(pipeline)
    original = key_value_matrices(pipeline, "RECE")
    started = uce.align(pipeline, concept, seed=seed, variant=start, **(start_options or {}))
    kernels = key_value_matrices(started, "RECE")
    states = text_states(pipeline, [*concept.erase, concept.target, *concept.preserve])
    concepts, target = states[: len(concept.erase)], states[len(concept.erase)]
    kept = np.concatenate([target, *states[len(concept.erase) + 1 :]])
    keep = Edit(kept, kept, np.full(len(kept), preserve_scale))
    for _ in range(epochs):
        revived = reviving_embeddings(concepts, original, kernels, embedding_ridge)
        sources = np.tile(target, (len(concepts), 1))
        edits = [Edit(revived.reshape(-1, revived.shape[-1]), sources, np.ones(len(sources))), keep]
        kernels = {p: solve(k, edits, [edit.sources @ k for edit in edits], ridge) for p, k in kernels.items()}
    return with_kernels(pipeline, kernels)


def reviving_embeddings(
    concepts: np.ndarray, original: dict[str, np.ndarray], edited: dict[str, np.ndarray], ridge: float
) -> np.ndarray:
    """c' for token states [T, L, d]: argmin over x of sum_i ||x K_i - c K0_i||^2 + ridge ||x||^2, K [d, out]."""
    d = concepts.shape[-1]
    gram, cross = ridge * np.eye(d), np.zeros((d, d))
    for path, kernel in edited.items():
        gram += kernel @ kernel.T
        cross += kernel @ original[path].T
    return concepts @ np.linalg.solve(gram, cross).T


METHOD = Method("rece", "RECE", align, backbones=("sd", "sdxl"))
