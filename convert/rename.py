"""One rule turns PyTorch state dicts into parameter pytrees and back.

The name of the target leaf decides. A `kernel` is a `weight` transposed (OIHW -> HWIO, [out, in] -> [in, out]). A
`scale` or an `embedding` is a `weight` as it is. Every other leaf has the same name in PyTorch. No key is skipped: one
error lists all keys that are missing, unexpected, set twice or of the wrong shape.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import jax.numpy as jnp
import numpy as np

from convert import arrays, kinds
from convert.families import COMPONENTS
from spqr_jax import params as params_lib
from spqr_jax.params import Params

WEIGHT_LEAVES = ("kernel", "scale", "embedding")
# Kind of component -> (old name in published files, present name).
OLD_NAMES = {
    kinds.VAE: (
        (re.compile(r"\.query\."), ".to_q."),
        (re.compile(r"\.key\."), ".to_k."),
        (re.compile(r"\.value\."), ".to_v."),
        (re.compile(r"\.proj_attn\."), ".to_out.0."),
    ),
    kinds.TEXT_ENCODER: ((re.compile(r"^(embeddings|encoder\.layers|final_layer_norm)\b"), r"text_model.\1"),),
}
# Buffers, not parameters: CLIP files written before transformers 4.31 hold the positions 0..76.
IGNORED = re.compile(r"(^|\.)position_ids$")
# The largest weight of a tensor lies between these in every working model. Numbers beyond them are bytes in wrong
# order.
PLAUSIBLE = (1e-30, 1e15)
# Tensors that are read and transposed at once, each in a thread, since both wait for memory.
THREADS = min(4, os.cpu_count() or 1)


class ConversionError(ValueError):
    """A state dict does not fit the model; the message lists every key at fault."""


def torch_name(path: str) -> str:
    """The path of our leaf -> PyTorch's key."""
    parent, _, leaf = path.rpartition(".")
    return f"{parent}.weight" if leaf in WEIGHT_LEAVES else path


def to_ours(path: str, array: np.ndarray, ndim: int | None = None) -> np.ndarray:
    """A PyTorch tensor in the layout of the leaf at `path`.

    A 1x1 convolution becomes a linear layer if the leaf has `ndim` 2. CompVis writes attention layers as convolutions.
    """
    if ndim == 2 and array.ndim > 2 and set(array.shape[2:]) == {1}:
        array = array.reshape(array.shape[:2])
    if path.endswith(".kernel") and array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    return array.T if path.endswith(".kernel") and array.ndim == 2 else array


def to_torch(path: str, array: np.ndarray) -> np.ndarray:
    """The inverse of `to_ours`."""
    view = transposed(path, array)
    return view if view.flags.c_contiguous else arrays.contiguous(view, view.dtype)


def transposed(path: str, array: np.ndarray) -> np.ndarray:
    """As `to_torch`, but a view."""
    if path.endswith(".kernel") and array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    return array.T if path.endswith(".kernel") and array.ndim == 2 else array


def modern_name(key: str, component: str) -> str:
    """The present name of a key in an older file."""
    for pattern, name in OLD_NAMES.get(COMPONENTS[component].kind, ()):
        key = pattern.sub(name, key)
    return key


def from_torch(
    state: Mapping[str, Any],
    skeleton: Params,
    *,
    component: str,
    source: str,
    partial: bool = False,
    dtype="float32",
    name: Callable[[str], str] | None = None,
) -> Params:
    """State dict -> parameters shaped like `skeleton` (jax.ShapeDtypeStruct leaves), in `dtype`.

    name: key -> its name in diffusers, default `modern_name`. partial: leaves may be missing, as in the files of
    methods that change a part of the model; only those present are returned. Raises ConversionError with every key
    that is missing, unexpected, set twice, of the wrong shape or damaged, under the file's own names.
    """
    leaves = params_lib.flatten(skeleton)
    found, problems = _read(state, leaves, name or (lambda key: modern_name(key, component)), np.dtype(dtype))
    if not partial:
        problems["missing"] = [torch_name(path) for path in leaves if path not in found]
    if any(problems.values()) or not found:
        raise ConversionError(_message(source, component, problems, state))
    return params_lib.unflatten({path: found[path] for path in leaves if path in found})


def _read(
    state: Mapping[str, Any], leaves: Mapping[str, Any], name: Callable[[str], str], dtype: np.dtype
) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """(leaf path -> tensor in our layout and `dtype`, problem -> keys at fault). A faulty tensor counts as found."""
    expected = {torch_name(path): path for path in leaves}
    keys: dict[str, str] = {}
    problems: dict[str, list[str]] = {}
    for key in state:
        if IGNORED.search(key):
            continue
        path = expected.get(name(key))
        if path is None:
            problems.setdefault("unexpected", []).append(key)
        elif path in keys:
            problems.setdefault("set twice", []).append(key)
        else:
            keys[path] = key
    found: dict[str, np.ndarray] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        read = pool.map(lambda path: _leaf(path, state[keys[path]], tuple(leaves[path].shape), dtype), keys)
        for (path, key), (array, problem, detail) in zip(keys.items(), read, strict=True):
            found[path] = array
            if problem:
                problems.setdefault(problem, []).append(key + detail)
    return found, problems


def _leaf(path: str, tensor: Any, shape: tuple[int, ...], dtype: np.dtype) -> tuple[np.ndarray, str, str]:
    """(tensor in our layout and `dtype`, its problem or "", what follows its key in the message)."""
    array = to_ours(path, np.asarray(tensor), len(shape))
    if array.shape != shape:
        return array, "wrong shape", f" (expected {shape}, found {array.shape})"
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array, "not floating point", f" ({array.dtype})"
    with np.errstate(over="ignore"):  # a number too large becomes Inf, which is named
        array = arrays.contiguous(array, dtype)  # also brings the file's byte order to the machine's
    return array, damage_of(array), ""


def damage_of(array: np.ndarray) -> str:
    """The fault of a tensor's numbers: "NaN or Inf", "wrong byte order?", or "" for none."""
    values = array if array.dtype.kind == "f" else array.astype(np.float32)
    peak = float(max(values.max(), -values.min())) if values.size else 0.0
    if not np.isfinite(peak):  # NaN passes through max and min
        return "NaN or Inf"
    return "" if peak == 0 or PLAUSIBLE[0] < peak < PLAUSIBLE[1] else "wrong byte order?"


def into_torch(params: Params) -> dict[str, np.ndarray]:
    """Parameters -> state dict of NumPy arrays under PyTorch's names and layouts."""
    return {torch_name(path): to_torch(path, np.asarray(leaf)) for path, leaf in params_lib.flatten(params).items()}


@contextmanager
def collect(errors: list[str]) -> Iterator[None]:
    """Adds the message of a ConversionError to `errors` and goes on, so that one error lists all components' faults."""
    try:
        yield
    except ConversionError as error:
        errors.append(str(error))


def raise_all(errors: list[str]) -> None:
    """Raises one ConversionError with all messages, if there are any."""
    if errors:
        raise ConversionError("\n".join(errors))


def _message(source: str, component: str, problems: dict[str, list[str]], state: Mapping[str, Any]) -> str:
    parts = [f"{len(problems[what])} {what}: {', '.join(problems[what])}" for what in problems if problems[what]]
    if not parts:
        parts = ["it holds no tensors"]
    return f"{source} does not fit the {component}: {'; '.join(parts)}.{kinds.hint(state)}"
