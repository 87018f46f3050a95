"""SD3's transformer under the names of the original code (Stability's sd3_impls).

The original keeps queries, keys and values in one matrix, and has the shift before the scale where diffusers' last
norms have the scale first.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from convert.tensors import View

# Keys without prefix that only this code uses.
KEY = re.compile(r"^(joint_blocks|x_embedder|t_embedder|y_embedder|context_embedder|final_layer)\.|^pos_embed$")

_TOP = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_BLOCK = {
    **{f"{attn}.to_{part}": f"x_block.{attn}.qkv" for attn in ("attn", "attn2") for part in "qkv"},
    **{f"{attn}.norm_{part}": f"x_block.{attn}.ln_{part}" for attn in ("attn", "attn2") for part in "qk"},
    **{f"{attn}.to_out.0": f"x_block.{attn}.proj" for attn in ("attn", "attn2")},
    **{f"attn.add_{part}_proj": "context_block.attn.qkv" for part in "qkv"},
    **{f"attn.norm_added_{part}": f"context_block.attn.ln_{part}" for part in "qk"},
    "attn.to_add_out": "context_block.attn.proj",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
_STACKED = re.compile(r"\.(?:to_|add_)([qkv])(?:_proj)?$")


class Place(NamedTuple):
    """Where the original code has a layer. part: 0, 1 or 2 of a stack of three. swapped: halves change places."""

    layer: str
    part: int | None = None
    swapped: bool = False


def place(layer: str, blocks: int) -> Place | None:
    """The original place of a layer (or buffer) of diffusers' name; None if there is none. blocks: their number."""
    if layer in _TOP:
        return Place(_TOP[layer], swapped=layer == "norm_out.linear")
    match = re.match(r"^transformer_blocks\.(\d+)\.(.+)$", layer)
    if match is None or match[2] not in _BLOCK:
        return None
    stacked = _STACKED.search(f".{match[2]}")
    swapped = match[2] == "norm1_context.linear" and int(match[1]) == blocks - 1
    name = f"joint_blocks.{match[1]}.{_BLOCK[match[2]]}"
    return Place(name, "qkv".index(stacked[1]) if stacked else None, swapped)


def cut(where: Place, tensor: Any) -> np.ndarray:
    """The rows of an original tensor that belong to a layer, in diffusers' order.

    Of a tensor that does not divide so, the rows that are there: its shape is then found to be wrong.
    """
    array = np.asarray(tensor)
    if where.part is not None:
        array = np.array_split(array, 3)[where.part]
    return np.concatenate(np.array_split(array, 2)[::-1]) if where.swapped else array


def originals(ours: Iterable[str]) -> dict[str, list[tuple[str, Callable[[Any], np.ndarray]]]]:
    """Each layer of the original code -> diffusers' layers in it, each with the function that cuts its rows out.

    ours: names of diffusers' layers.
    """
    names = list(ours)
    blocks, found = blocks_of(names), dict[str, list[tuple[str, Callable[[Any], np.ndarray]]]]()
    for name in names:
        if where := place(name, blocks):
            found.setdefault(where.layer, []).append((name, _cutting(where)))
    return found


def view(state: Mapping[str, Any], keys: Iterable[str], names: Iterable[str], blocks: int, prefix: str) -> View:
    """A transformer's tensors under diffusers' `names`, as far as `keys` of the file have them.

    Keys of the file that no name needs stay as they are, so that they are listed as unexpected.
    """
    held, used, entries = set(keys), set(), {}
    for name in names:
        layer, _, leaf = name.rpartition(".")
        where = place(name, blocks) or place(layer, blocks)
        key = prefix + (where.layer if where and name in _TOP else f"{where.layer}.{leaf}" if where else name)
        if where is not None and key in held:
            used.add(key)
            entries[name] = (key, _cutting(where))
    return View(state, entries | {key: (key, lambda tensor: tensor) for key in held - used})


def _cutting(where: Place) -> Callable[[Any], np.ndarray]:
    return lambda tensor: cut(where, tensor)


def blocks_of(names: Iterable[str]) -> int:
    """The number of blocks of a transformer with these names."""
    return 1 + max((int(name.split(".")[1]) for name in names if name.startswith("transformer_blocks.")), default=-1)
