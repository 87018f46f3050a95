"""From the names of FLUX's original code (Black Forest Labs) to diffusers' names.

The original code keeps query, key and value in one matrix, in single blocks the first feed-forward layer too, and the
last modulation as shift, then scale, where diffusers has scale, then shift. A name here is a part of such a tensor:
`double_blocks.0.img_attn.qkv.weight[1]` holds the keys.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from convert.tensors import View

PREFIX = "model.diffusion_model."  # in files that hold other components beside the transformer
BLOCK = re.compile(r"(^|\.)(double|single)_blocks\.\d+\.")
_KEY = re.compile(
    r"^(model\.diffusion_model\.)?(double_blocks\.\d+\.|single_blocks\.\d+\.|(img|txt|time|vector|guidance)_in\."
    r"|final_layer\.)"
)
_EMBEDDER = {"time_in": "timestep_embedder", "vector_in": "text_embedder", "guidance_in": "guidance_embedder"}
_TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    **{f"{old}.in_layer": f"time_text_embed.{new}.linear_1" for old, new in _EMBEDDER.items()},
    **{f"{old}.out_layer": f"time_text_embed.{new}.linear_2" for old, new in _EMBEDDER.items()},
}
_DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
# Rows of a stacked matrix: each of query, key and value has one share, and the feed-forward layer four.
_SHARES = {3: (1, 1, 1), 4: (1, 1, 1, 4)}
_SWAPPED = "final_layer.adaLN_modulation.1"


def is_key(key: str) -> bool:
    """Whether the original code of FLUX uses such a name."""
    return bool(_KEY.match(key))


def layers(layer: str) -> tuple[str, ...]:
    """diffusers' layers of a layer of the original code, in the order of its rows; () if there is no such layer."""
    if layer in _TOP:
        return (_TOP[layer],)
    match = re.match(r"^(double|single)_blocks\.(\d+)\.(.+)$", layer)
    if match is None:
        return ()
    kind = "" if match[1] == "double" else "single_"
    inside = (_DOUBLE if match[1] == "double" else _SINGLE).get(match[3], ())
    return tuple(f"{kind}transformer_blocks.{match[2]}.{name}" for name in inside)


def rows(layer: str, stacked: np.ndarray) -> list[np.ndarray]:
    """The rows of each of `layers(layer)` in a tensor whose first axis is a stack of theirs.

    Of a tensor that does not divide so, the rows that are there: its shape is then found to be wrong.
    """
    if layer == _SWAPPED:
        shift, scale = np.array_split(stacked, 2)
        return [np.concatenate([scale, shift])]
    count = len(layers(layer))
    if count == 1:
        return [stacked]
    shares = _SHARES[count]
    return np.split(stacked, np.cumsum(shares[:-1]) * (len(stacked) // sum(shares)))


def separated(state: Mapping[str, Any]) -> View:
    """A transformer's tensors, those of stacked layers under the names of their parts, each read when it is asked."""
    entries: dict[str, tuple[str, Any]] = {}
    for key in state:
        layer = _split(key)[0]
        if len(layers(layer)) < 2 and layer != _SWAPPED:
            entries[key] = (key, lambda tensor: tensor)
            continue
        for i in range(len(layers(layer))):
            entries[f"{key}[{i}]"] = (key, _cutting(layer, i))
    return View(state, entries)


def name(key: str) -> str:
    """A key of `separated` -> diffusers' key. An unknown key stays as it is."""
    whole, _, part = key.partition("[")
    layer, leaf = _split(whole)
    found = layers(layer)
    return f"{found[int(part[:-1]) if part else 0]}.{leaf}" if found else key


def _split(key: str) -> tuple[str, str]:
    """(layer, leaf) of a key. A norm's `scale` is diffusers' `weight`."""
    layer, _, leaf = key.removeprefix(PREFIX).rpartition(".")
    return layer, "weight" if leaf == "scale" else leaf


def originals(ours: Iterable[str]) -> dict[str, list[tuple[str, Callable[[Any], np.ndarray]]]]:
    """Each layer of the original code -> diffusers' layers in it, each with the function that cuts its rows out.

    ours: names of diffusers' layers, by which the blocks are known.
    """
    found = {match.groups() for name in ours if (match := re.match(r"^(single_)?transformer_blocks\.(\d+)\.", name))}
    names = [
        f"{'single' if single else 'double'}_blocks.{number}.{layer}"
        for single, number in found
        for layer in (_SINGLE if single else _DOUBLE)
    ]
    return {name: [(part, _cutting(name, i)) for i, part in enumerate(layers(name))] for name in (*_TOP, *names)}


def _cutting(layer: str, part: int) -> Callable[[Any], np.ndarray]:
    return lambda tensor: rows(layer, np.asarray(tensor))[part]
