"""The one rule that turns PyTorch state dicts into parameter pytrees and back.

The target leaf decides: `kernel` takes a `weight` transposed (OIHW -> HWIO, [out, in] -> [in, out]), `scale` and
`embedding` take it as it is, every other leaf keeps its name. Nothing is skipped: missing, unexpected, twice-set and
misshapen keys are gathered into one error.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from spqr_jax import params as params_lib
from spqr_jax.params import Params

WEIGHT_LEAVES = ("kernel", "scale", "embedding")
# Names that published files still carry, and what the modules are called now.
OLD_NAMES = (
    (re.compile(r"\.query\."), ".to_q."),
    (re.compile(r"\.key\."), ".to_k."),
    (re.compile(r"\.value\."), ".to_v."),
    (re.compile(r"\.proj_attn\."), ".to_out.0."),
    (re.compile(r"^(embeddings|encoder\.layers|final_layer_norm)\b"), r"text_model.\1"),
)
# Buffers, not parameters: CLIP files written before transformers 4.31 hold the positions 0..76.
IGNORED = re.compile(r"(^|\.)position_ids$")


class ConversionError(ValueError):
    """A state dict does not fit the model; the message lists every key at fault."""


def torch_name(path: str) -> str:
    """Our leaf path -> PyTorch's key."""
    parent, _, leaf = path.rpartition(".")
    return f"{parent}.weight" if leaf in WEIGHT_LEAVES else path


def to_ours(path: str, array: np.ndarray) -> np.ndarray:
    """A PyTorch tensor in the layout of the leaf at `path`."""
    if path.endswith(".kernel") and array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    return array.T if path.endswith(".kernel") and array.ndim == 2 else array


def to_torch(path: str, array: np.ndarray) -> np.ndarray:
    """The inverse of `to_ours`."""
    if path.endswith(".kernel") and array.ndim == 4:
        return np.ascontiguousarray(array.transpose(3, 2, 0, 1))
    return np.ascontiguousarray(array.T) if path.endswith(".kernel") and array.ndim == 2 else array


def modern_name(key: str, component: str) -> str:
    """A key of an older file under its present name."""
    for pattern, name in OLD_NAMES:
        is_text_rule = name.startswith("text_model")
        if is_text_rule == component.startswith("text_encoder") and (is_text_rule or component == "vae"):
            key = pattern.sub(name, key)
    return key


def from_torch(
    state: Mapping[str, Any], skeleton: Params, *, component: str, source: str, partial: bool = False, dtype="float32"
) -> Params:
    """State dict -> parameters shaped like `skeleton` (jax.ShapeDtypeStruct leaves), in `dtype`.

    `partial=True` allows leaves to be missing (a file that holds only what a method changed) and returns only those
    present. Raises ConversionError naming every missing, unexpected, twice-set or misshapen key.
    """
    expected = {torch_name(path): path for path in params_lib.flatten(skeleton)}
    shapes = {path: tuple(leaf.shape) for path, leaf in params_lib.flatten(skeleton).items()}
    found: dict[str, np.ndarray] = {}
    misshapen: dict[str, str] = {}
    unexpected, twice, bad = [], [], []
    for key in state:
        if IGNORED.search(key):
            continue
        path = expected.get(modern_name(key, component))
        if path is None:
            unexpected.append(key)
        elif path in found or path in misshapen:
            twice.append(key)
        else:
            array = to_ours(path, np.asarray(state[key]))
            if array.shape != shapes[path]:
                misshapen[path] = f"{key} (expected {shapes[path]}, found {array.shape})"
                continue
            # Also brings the file's byte order to the machine's.
            found[path] = np.ascontiguousarray(array, dtype=np.dtype(dtype))
            if not np.isfinite(found[path].astype(np.float32)).all():
                bad.append(key)
    missing = [] if partial else [torch_name(p) for p in shapes if p not in found and p not in misshapen]
    problems = {
        "missing": missing,
        "unexpected": unexpected,
        "set twice": twice,
        "wrong shape": list(misshapen.values()),
        "NaN or Inf": bad,
    }
    if any(problems.values()) or not found:
        raise ConversionError(_message(source, component, problems, state))
    return params_lib.unflatten({path: found[path] for path in shapes if path in found})


def into_torch(params: Params) -> dict[str, np.ndarray]:
    """Parameters -> state dict of NumPy arrays under PyTorch's names and layouts."""
    return {torch_name(path): to_torch(path, np.asarray(leaf)) for path, leaf in params_lib.flatten(params).items()}


def _message(source: str, component: str, problems: dict[str, list[str]], keys: Iterable[str]) -> str:
    parts = [f"{len(found)} {what}: {', '.join(found)}" for what, found in problems.items() if found]
    if not parts:
        parts = ["it holds no tensors"]
    return f"{source} does not fit the {component}: {'; '.join(parts)}.{_guess(list(keys))}"


def _guess(keys: list[str]) -> str:
    """What the keys look like, to help who passed the wrong file. Containers come before what they contain."""
    looks = {
        "a LoRA": r"lora_(A|B|up|down|unet)|_lora\.(up|down)\.",
        "a CompVis checkpoint": r"^model\.diffusion_model\.|first_stage_model\.",
        "a UNet": r"^(unet\.)?(down_blocks|up_blocks|mid_block)\.",
        "a VAE": r"^(vae\.)?(encoder|decoder)\.(down|up|mid)",
        "a text encoder": r"(^|\.)text_model\.|self_attn\.q_proj",
    }
    for what, pattern in looks.items():
        if any(re.search(pattern, key) for key in keys):
            return f" It looks like {what}."
    return ""
