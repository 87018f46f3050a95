"""Adapters inside the parameter tree, in PEFT's form. LoRA: y = W x + alpha / rank * B(A(dropout(x))). DoRA: `DoRA`."""

import re
import zlib
from typing import Any

import jax
import numpy as np
from flax import nnx

from spqr_jax import backbones
from spqr_jax import params as params_lib
from spqr_jax.backbones.models.layers import LORA_INITS, LORA_LEAF, DoRA, LoRA, scaled_to
from spqr_jax.params import Definition, Params

DROPOUT = zlib.crc32(b"dropout")  # names the stream of random numbers of the dropout masks


def attach(
    definition: Definition,
    params: Params,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.1,
    init: str = "kaiming",
    dora: bool = False,
    seed: int | jax.Array = 0,
    targets: re.Pattern | None = None,
) -> tuple[Definition, Params]:
    """A model with fresh adapters on the linear layers whose kernel path matches `targets` (paper Table C's defaults).

    seed: an integer or a key. targets: default the region "lora" of the denoiser's backbone. init: the distribution of
    A (`LoRA`); B is zero, so the adapted model starts equal to `params`. dora: adapters with magnitudes (`DoRA`).
    Dropout keys are leaves too; `split_keys` separates them. Raises ValueError for an unknown `init`, if no layer
    matches, or if the rank is larger than a side of a layer's kernel.
    """
    if init not in LORA_INITS:
        raise ValueError(f"lora_init {init!r} is unknown; expected one of {', '.join(LORA_INITS)}.")
    targets = targets or backbones.regions(params).lora
    shapes = params_lib.flatten(params)
    chosen = [path.removesuffix(".kernel") for path in shapes if targets and targets.search(path)]
    if not chosen:
        raise ValueError("LoRA: no linear layer matches the targets; is this a model with attention?")
    for path in chosen:
        if rank > min(shapes[f"{path}.kernel"].shape) or rank < 1:
            raise ValueError(f"LoRA rank {rank} does not fit {path} {shapes[f'{path}.kernel'].shape}.")

    def build() -> nnx.Module:
        model = definition.bind(params)
        options: dict[str, Any] = {"rank": rank, "alpha": alpha, "dropout": dropout, "init": init}
        options["rngs"] = nnx.Rngs(seed)
        for path in chosen:
            layer = module_at(model, path)
            layer.lora = DoRA(layer.kernel[...], **options) if dora else LoRA(*layer.kernel.shape, **options)
        return model

    return params_lib.split(build())


def module_at(model: nnx.Module, path: str) -> Any:
    """The module at a path ("down_blocks.0.attentions.0") of a bound model."""
    node: Any = model
    for key in path.split("."):
        node = node[int(key)] if key.isdigit() else getattr(node, key)
    return node


def split_keys(params: Params) -> tuple[Params, Params]:
    """Parameters with adapters -> (all parameters, dropout keys)."""
    flat = params_lib.flatten(params)
    keys = {path: leaf for path, leaf in flat.items() if path.endswith(".lora.key")}
    rest = {path: leaf for path, leaf in flat.items() if path not in keys}
    return params_lib.unflatten(rest), params_lib.unflatten(keys)


def fresh_keys(keys: Params, key: jax.Array, batch: int) -> Params:
    """New dropout keys [batch, 2] of every layer for one step.

    A sample's key depends on `key`, the layer and the sample's place in the batch. So its mask is the same, whether the
    batch is computed at once, in parts, or on several devices.
    """
    if not keys:
        return {}
    paths = sorted(params_lib.flatten(keys))
    # A key of their own: fold_in(key, i) would be the i-th of split(key), which the noise of the step is drawn from.
    own = jax.random.fold_in(key, DROPOUT)
    drawn = jax.random.key_data(jax.random.split(own, (len(paths), batch)))
    return params_lib.unflatten(dict(zip(paths, drawn, strict=True)))


def merge(params: Params, *, alpha: float) -> Params:
    """The weights with the adapters folded in: kernel + alpha / rank * A B. The result has no leaves of adapters.

    With a magnitude (DoRA) the weights of each output are scaled to it.
    """
    flat = {path: leaf for path, leaf in params_lib.flatten(params).items() if not path.endswith(".lora.key")}
    merged = {path: leaf for path, leaf in flat.items() if ".lora." not in path}
    for path in flat:
        if path.endswith(".lora.lora_A.kernel"):
            layer = path.removesuffix(".lora.lora_A.kernel")
            down, up = np.asarray(flat[path]), np.asarray(flat[f"{layer}.lora.lora_B.kernel"])
            kernel = np.asarray(merged[f"{layer}.kernel"])
            whole = kernel + alpha / down.shape[1] * (down @ up)
            if (magnitude := flat.get(f"{layer}.lora.magnitude")) is not None:
                whole = scaled_to(np.asarray(whole, np.float32), np.asarray(magnitude, np.float32))
            merged[f"{layer}.kernel"] = whole.astype(kernel.dtype)
    return params_lib.unflatten(merged)


def peft_state_dict(params: Params, *, alpha: float, prefix: str) -> dict[str, np.ndarray]:
    """The adapters alone, under diffusers' names (`<prefix>.<layer>.lora_A.weight`), for `load_lora_weights`.

    prefix: the name of the denoiser's component (`Backbone.denoiser`). B is multiplied by alpha / rank, because a state
    dict carries no alpha and diffusers then takes alpha = rank.
    """
    state = {}
    for path, leaf in params_lib.flatten(params).items():
        if LORA_LEAF.search(path):
            weight = np.asarray(leaf).T
            if path.endswith(".lora_B.kernel"):
                weight = weight * np.asarray(alpha / weight.shape[1], weight.dtype)
            # PEFT saves magnitudes without ".weight".
            name = path.replace(".lora.magnitude", ".lora_magnitude_vector").replace(".lora.", ".")
            name = re.sub(r"\.kernel$", ".weight", name)
            state[f"{prefix}.{name}"] = np.ascontiguousarray(weight)
    return state
