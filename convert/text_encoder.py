"""Text encoders in every published form: CLIPTextModel, CLIPModel, AdvUnlearn's wrapper, OpenCLIP, T5."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from convert import components, rename
from convert.rename import ConversionError
from convert.tensors import View, subset
from spqr_jax.backbones import class_name
from spqr_jax.backbones.models import clip_text
from spqr_jax.params import Params
from spqr_jax.pipeline import Pipeline

_PREFIX = re.compile(
    r"^(module\.)?(text_encoder(_[23])?\."
    r"|(cond_stage_model|conditioner\.embedders\.\d|text_encoders\.\w+)\.(transformer\.|model\.)?)?"
)
# The other half of CLIP and its training scalars.
_NOT_TEXT = re.compile(r"^(vision_model\.|visual_projection\.|visual\.|logit_scale$|logit_bias$|attn_mask$)")
# AdvUnlearn keeps the encoder's parts a second time under these names.
_ALIASES = {"embedding.": "embeddings.", "encoder.": "encoder.", "final_layer_norm.": "final_layer_norm."}
_T5_TABLE = "encoder.embed_tokens.weight"

_OPEN_CLIP = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
}
_OPEN_CLIP_BLOCK = {
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
    "attn.out_proj.": "self_attn.out_proj.",
}


def bare(key: str) -> str:
    """The key without the prefixes of a text encoder: `text_encoder.`, `cond_stage_model.transformer.`, ..."""
    return _PREFIX.sub("", key)


def from_torch(state: Mapping[str, Any], skeleton: Params, *, component: str, source: str, dtype: str) -> Params:
    """The parameters of a text encoder in any published form. Raises ConversionError as `rename.from_torch`."""
    if "shared" in skeleton:
        return t5(state, skeleton, component=component, source=source, dtype=dtype)
    keys = [key for key in state if not _NOT_TEXT.match(bare(key))]
    with_projection = "text_projection" in skeleton
    if any(".resblocks." in f".{key}" for key in keys):
        layers = len(skeleton["text_model"]["encoder"]["layers"])
        chosen: Mapping[str, Any] = open_clip(state, keys, layers=layers, with_projection=with_projection)
        return rename.from_torch(
            chosen,
            skeleton,
            component=component,
            source=source,
            dtype=dtype,
            name=lambda key: open_clip_name(bare(key)),
        )
    if not with_projection:  # CLIPModel has one; a plain text encoder does not use it
        keys = [key for key in keys if bare(key) != "text_projection.weight"]
    keys = without_aliases(state, keys, source)
    return rename.from_torch(
        subset(state, keys),
        skeleton,
        component=component,
        source=source,
        dtype=dtype,
        name=lambda key: rename.modern_name(bare(key), component),
    )


def t5(state: Mapping[str, Any], skeleton: Params, *, component: str, source: str, dtype: str) -> Params:
    """The parameters of a T5 encoder. Its table of tokens may stand in the file once or twice, under two names."""
    names = {bare(key): key for key in state}
    twice = {_T5_TABLE, "shared.weight"} <= set(names)
    if twice and not np.array_equal(np.asarray(state[names[_T5_TABLE]]), np.asarray(state[names["shared.weight"]])):
        raise ConversionError(f"{source}: set twice with different values: {_T5_TABLE} (unlike shared.weight).")
    keys = [key for name, key in names.items() if not (twice and name == _T5_TABLE)]
    return rename.from_torch(
        subset(state, keys),
        skeleton,
        component=component,
        source=source,
        dtype=dtype,
        name=lambda key: "shared.weight" if bare(key) == _T5_TABLE else bare(key),
    )


def without_aliases(state: Mapping[str, Any], keys: list[str], source: str) -> list[str]:
    """The keys without AdvUnlearn's second copies. Raises ConversionError if a copy differs from the original."""
    originals = {bare(key): key for key in keys if "text_model." in key}
    kept, different = [], []
    for key in keys:
        stem = next((s for s in _ALIASES if key.startswith(s)), None)
        original = originals.get(f"text_model.{_ALIASES[stem]}{key[len(stem) :]}") if stem else None
        if original is None:
            kept.append(key)
        elif not np.array_equal(np.asarray(state[key]), np.asarray(state[original]), equal_nan=True):
            different.append(f"{key} (unlike {original})")
    if different:
        raise ConversionError(f"{source}: {len(different)} set twice with different values: {', '.join(different)}.")
    return kept


def open_clip(state: Mapping[str, Any], keys: list[str], *, layers: int, with_projection: bool) -> View:
    """OpenCLIP's text tower, with query, key and value unstacked and the projection transposed.

    Stable Diffusion 2 reads the penultimate layer. So its encoder has one layer less than the file, and no projection;
    both are left out.
    """
    entries: dict[str, tuple[str, Any]] = {}
    for key in keys:
        name = bare(key)
        if name == "text_projection":
            if with_projection:
                entries[key] = (key, np.transpose)
        elif re.match(rf"transformer\.resblocks\.{layers}\.", name) and not with_projection:
            continue
        elif ".attn.in_proj_" in name:
            for i, part in enumerate("qkv"):
                entries[f"{key}[{part}]"] = (key, lambda stacked, i=i: np.split(np.asarray(stacked), 3)[i])
        else:
            entries[key] = (key, lambda tensor: tensor)
    return View(state, entries)


def open_clip_name(key: str) -> str:
    """OpenCLIP's key (in_proj marked [q], [k], [v]) -> transformers' key. An unknown key stays as it is."""
    if key in _OPEN_CLIP:
        return _OPEN_CLIP[key]
    match = re.match(r"^transformer\.resblocks\.(\d+)\.(.+)$", key)
    if match is None:
        return key
    layer, rest = f"text_model.encoder.layers.{match[1]}", match[2]
    stacked = re.match(r"^attn\.in_proj_(weight|bias)\[([qkv])\]$", rest)
    if stacked:
        return f"{layer}.self_attn.{stacked[2]}_proj.{stacked[1]}"
    for old, new in _OPEN_CLIP_BLOCK.items():
        if rest.startswith(old):
            return f"{layer}.{new}{rest[len(old) :]}"
    return key


def place(pipeline: Pipeline, state: Mapping[str, Any], folder: str) -> str:
    """The text encoder of the pipeline that a file replaces, found by its name, its width, or its projection."""
    names = {bare(key): key for key in state}
    for name in (folder, *(key.partition(".")[0] for key in state)):
        if name == "text_encoder_2" and name in pipeline.params:
            return name
    if "text_encoder_2" not in pipeline.params or folder == "text_encoder":
        return "text_encoder"
    width = _width(state, names)
    fitting = [c for c in ("text_encoder", "text_encoder_2") if pipeline.configs[c].get("hidden_size") == width]
    if len(fitting) == 1:
        return fitting[0]
    return "text_encoder_2" if {"text_projection.weight", "text_projection"} & set(names) else "text_encoder"


def _width(state: Mapping[str, Any], names: Mapping[str, str]) -> int:
    for name in (
        "text_model.embeddings.token_embedding.weight",
        "embeddings.token_embedding.weight",
        "token_embedding.weight",
    ):
        if name in names:
            return int(np.asarray(state[names[name]]).shape[-1])
    return 0


def load(
    pipeline: Pipeline, state: Mapping[str, Any], config: dict[str, Any] | None, *, source: str, folder: str, dtype: str
) -> Pipeline:
    """The pipeline with one text encoder replaced by that of a file.

    config: the config.json beside the weights, or None; in a CLIPModel's the text part is nested. folder: name of the
    directory that holds the file. Raises ConversionError if the encoder does not fit the pipeline.
    """
    if any(".SelfAttention." in key for key in state):
        return _load_t5(pipeline, state, config, source=source, dtype=dtype)
    component = place(pipeline, state, folder)
    if config and "text_config" in config:
        config = config["text_config"] | {"projection_dim": config.get("projection_dim", 512)}
    # transformers leaves out fields that have their default value.
    config = clip_text.DEFAULTS | config if config else pipeline.configs[component]
    definition, skeleton = components.define(component, config)
    params = from_torch(state, skeleton, component=component, source=source, dtype=dtype)
    widths = [c.get("hidden_size", 512) for c in (config, pipeline.configs[component])]
    lengths = [c.get("max_position_embeddings", 77) for c in (config, pipeline.configs[component])]
    if widths[0] != widths[1] or lengths[0] != lengths[1]:
        raise ConversionError(
            f"{source} does not fit the {component} of {pipeline.name}: {lengths[0]} states of {widths[0]} numbers, "
            f"expected {lengths[1]} of {widths[1]}."
        )
    return components.replace(pipeline, component, params, definition, config)


def _load_t5(
    pipeline: Pipeline, state: Mapping[str, Any], config: dict[str, Any] | None, *, source: str, dtype: str
) -> Pipeline:
    """As `load`, for T5."""
    found = (name for name in pipeline.params if class_name(name, pipeline.configs[name]) == "T5EncoderModel")
    component = next(found, None)
    if component is None:
        raise ConversionError(
            f"{source} is a T5 encoder, which {pipeline.name} does not have (it has {', '.join(pipeline.params)}); "
            "pass a pipeline with T5 with base=...."
        )
    config = config or pipeline.configs[component]
    wide, expected = (c["d_model"] for c in (config, pipeline.configs[component]))
    if wide != expected:
        raise ConversionError(
            f"{source} does not fit the {component} of {pipeline.name}: states of {wide} numbers, expected {expected}."
        )
    definition, skeleton = components.define(component, config)
    params = t5(state, skeleton, component=component, source=source, dtype=dtype)
    return components.replace(pipeline, component, params, definition, config)
