"""`load`: one entry for every kind of checkpoint."""

import os
from typing import Any

import numpy as np

from convert import adapters, diffusers_dir, kinds, ldm, recognition, rename, single_file, text_encoder
from convert.rename import ConversionError
from spqr_jax import params as params_lib
from spqr_jax import pipeline as pipeline_lib
from spqr_jax.pipeline import Pipeline

# A UNet file with more than this share of the leaves, yet not all, is a damaged whole and no partial checkpoint: what
# methods leave out (cross-attention, or all but it; norms) is more.
NEARLY_ALL = 0.9


def load(
    source: str | os.PathLike | Pipeline,
    *,
    base: str | os.PathLike | Pipeline | None = None,
    dtype: str = "float32",
    strength: float = 1.0,
) -> Pipeline:
    """Load a pipeline from any of the forms checkpoints come in; which one is told from the keys (`recognise`).

    Args:
        source: a diffusers directory; a directory or file of one component (UNet, whole or partial, VAE, text
            encoder); a single-file CompVis checkpoint; a LoRA (PEFT, diffusers, kohya, legacy processors) or an SPM
            adapter, which are merged into the weights; or "hub:owner/name[@revision][/path inside]", the only form
            that downloads. A Pipeline is returned as it is.
        base: the pipeline (or its source) that a partial source changes.
        dtype: "float32" or "bfloat16", of every parameter.
        strength: factor on a LoRA or SPM adapter.

    Raises FileNotFoundError when the path does not exist, ConversionError when the content does not fit (naming every
    key at fault) or needs a base, ValueError for another dtype (float16 overflows in SDXL's VAE).
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f'dtype must be "float32" or "bfloat16", found {dtype!r}.')
    if isinstance(source, Pipeline):
        return source
    opened = recognition.open_source(source)
    kind = opened.recognised.kind
    if kind == kinds.PIPELINE:
        return diffusers_dir.load_pipeline(opened.path, dtype=dtype)
    if kind != kinds.COMPVIS and base is None:
        raise ConversionError(
            f"{opened.path}: this is {kinds.article(kind)} ({opened.recognised.detail}), not a whole pipeline; "
            "pass it with base=... naming the pipeline it belongs to."
        )
    below = None if base is None else _cast(load(base, dtype=dtype), dtype)
    name = str(opened.path)
    if kind == kinds.COMPVIS:
        return single_file.load(opened.state, below, source=name, dtype=dtype)
    assert below is not None
    if kind in (kinds.LORA, kinds.SPM):
        merged = adapters.merge(below, opened.state, config=opened.config, source=name, strength=strength)
        return merged._replace(name=name)
    if kind == kinds.TEXT_ENCODER:
        folder = opened.path.name if opened.path.is_dir() else opened.path.parent.name
        replaced = text_encoder.load(below, opened.state, opened.config, source=name, folder=folder, dtype=dtype)
        return replaced._replace(name=name)
    component = "unet" if kind == kinds.UNET else "vae"
    return _with_component(below, component, opened, dtype)._replace(name=name)


def _cast(pipeline: Pipeline, dtype: str) -> Pipeline:
    """Every parameter in `dtype`; the same arrays where they have it already."""

    def cast(_: str, leaf: Any) -> Any:
        return leaf if leaf.dtype == np.dtype(dtype) else leaf.astype(dtype)

    return pipeline._replace(params={c: params_lib.map_with_path(cast, p) for c, p in pipeline.params.items()})


def _with_component(pipeline: Pipeline, component: str, opened: recognition.Source, dtype: str) -> Pipeline:
    """The pipeline with its UNet or VAE replaced, or partly replaced, by a file's."""
    source, state = str(opened.path), opened.state
    config = opened.config or pipeline.configs[component]
    definition, skeleton = pipeline_lib.define(component, config)
    _check_interface(pipeline, component, config, source)
    if component == "vae" and any(ldm.is_vae_key(key) for key in state):
        params = single_file.from_torch(state, skeleton, component=component, config=config, source=source, dtype=dtype)
    else:
        leaves = params_lib.flatten(skeleton)
        partial = component == "unet" and opened.config is None and len(state) <= NEARLY_ALL * len(leaves)
        params = rename.from_torch(
            state,
            skeleton,
            component=component,
            source=source,
            partial=partial,
            dtype=dtype,
            name=lambda key: rename.modern_name(_bare(key, component), component),
        )
        if partial:
            params = params_lib.unflatten(params_lib.flatten(pipeline.params[component]) | params_lib.flatten(params))
    return pipeline._replace(
        params={**pipeline.params, component: params},
        definitions={**pipeline.definitions, component: definition},
        configs={**pipeline.configs, component: config},
    )


def _bare(key: str, component: str) -> str:
    return key.removeprefix("module.").removeprefix(f"{component}.")


def _check_interface(pipeline: Pipeline, component: str, config: dict[str, Any], source: str) -> None:
    """A component with its own config may differ inside, not where the others meet it."""
    fields = {"unet": ("in_channels", "cross_attention_dim", "addition_embed_type"), "vae": ("latent_channels",)}
    ours = pipeline.configs[component]
    for field in fields[component]:
        if config.get(field, ours.get(field)) != ours.get(field):
            raise ConversionError(
                f"{source} does not fit the {component} of {pipeline.name}: {field}={config.get(field)!r}, expected "
                f"{ours.get(field)!r}; pass a pipeline of the same family with base=...."
            )
