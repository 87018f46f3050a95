"""What UCE, RECE and MACE share: the cross-attention matrices, token pairs, and one regularised least-squares edit."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from spqr_jax import params as params_lib
from spqr_jax import pipeline as pipeline_lib
from spqr_jax.params import Params
from spqr_jax.pipeline import Pipeline

KEY_VALUE = re.compile(r"\.attn2\.to_[kv]\.kernel$")


class Edit(NamedTuple):
    """Inputs [M, d] whose outputs are to change, the inputs whose outputs they take [M, d], and weights [M]."""

    inputs: np.ndarray
    sources: np.ndarray
    weights: np.ndarray


def key_value_matrices(unet: Params) -> dict[str, np.ndarray]:
    """path -> kernel float64 [d, out] of every attn2.to_k and attn2.to_v. Raises ValueError when there is none."""
    found = {p: np.asarray(k, np.float64) for p, k in params_lib.flatten(unet).items() if KEY_VALUE.search(p)}
    if not found:
        raise ValueError("the UNet has no attn2.to_k or attn2.to_v; closed-form methods need cross-attention.")
    return found


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
    return np.asarray(pipeline_lib.encode_prompts(pipeline, list(texts)).context, np.float64)


def last_token(pipeline: Pipeline, text: str) -> int:
    """Position of a text's last word token; 0 (start of text) when it has none."""
    ids = pipeline.tokenizers["tokenizer"](text).input_ids
    return max(len(ids) - 2, 0)


def with_kernels(pipeline: Pipeline, kernels: dict[str, np.ndarray]) -> Pipeline:
    """The pipeline with these UNet kernels, in the dtype they had."""
    flat = params_lib.flatten(pipeline.params["unet"])
    flat |= {path: kernel.astype(flat[path].dtype) for path, kernel in kernels.items()}
    return pipeline.with_params(unet=params_lib.unflatten(flat))
