"""What UCE, RECE and MACE share: the cross-attention matrices, token pairs, and one regularised least-squares edit."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from spqr_jax import backbones
from spqr_jax import params as params_lib
from spqr_jax.pipeline import Pipeline


class Edit(NamedTuple):
    """Inputs [M, d] whose outputs are to change, the inputs whose outputs they take [M, d], and weights [M]."""

    inputs: np.ndarray
    sources: np.ndarray
    weights: np.ndarray


def key_value_matrices(pipeline: Pipeline, name: str) -> dict[str, np.ndarray]:
    """path -> kernel float64 [d, out] of everything that turns text states into keys and values.

    name: the method's. Raises ValueError naming it for a backbone without such kernels.
    """
    backbone = backbones.of(pipeline)
    region, weights = backbone.require("key_value", name), params_lib.flatten(backbone.weights(pipeline))
    return {path: np.asarray(kernel, np.float64) for path, kernel in weights.items() if region.search(path)}


def solve(
    kernel: np.ndarray, edits: Sequence[Edit], outputs: Sequence[np.ndarray], ridge: float | np.ndarray
) -> np.ndarray:
    """argmin_K ridge ||K - kernel||^2 + sum_i a_i ||c_i K - v_i||^2 for kernel [d, out], in float64.

    outputs: for each edit, the values v [M, out]. ridge: a number, or a matrix R [d, d] for tr (K - kernel)^T R
    (K - kernel): with R = sum e e^T, the texts e keep their outputs. The papers write W (our transpose):
    W* = (ridge W + sum a v c^T)(ridge I + sum a c c^T)^-1.
    """
    gram = ridge * np.eye(kernel.shape[0]) if np.ndim(ridge) == 0 else np.asarray(ridge)
    right = gram @ kernel
    for edit, values in zip(edits, outputs, strict=True):
        weighted = edit.inputs * edit.weights[:, None]
        gram = gram + weighted.T @ edit.inputs
        right = right + weighted.T @ values
    return np.linalg.solve(gram, right)


def text_states(pipeline: Pipeline, texts: Sequence[str]) -> np.ndarray:
    """Token states float64 [T, L, d] of texts."""
    return np.asarray(backbones.condition(pipeline, texts).context, np.float64)


def pooled_matrices(pipeline: Pipeline) -> dict[str, np.ndarray]:
    """path -> kernel float64 [P, out] of everything that reads the pooled text state and is edited; {} for none."""
    backbone = backbones.of(pipeline)
    region, weights = backbone.regions.pooled, params_lib.flatten(backbone.weights(pipeline))
    return {path: np.asarray(kernel, np.float64) for path, kernel in weights.items() if region and region.search(path)}


def with_kernels(pipeline: Pipeline, kernels: dict[str, np.ndarray]) -> Pipeline:
    """The pipeline with these kernels of its denoiser, in the dtype they had."""
    backbone = backbones.of(pipeline)
    flat = params_lib.flatten(backbone.weights(pipeline))
    flat |= {path: kernel.astype(flat[path].dtype) for path, kernel in kernels.items()}
    return backbone.with_weights(pipeline, params_lib.unflatten(flat))
