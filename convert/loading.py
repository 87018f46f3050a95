"""`load` reads every kind of checkpoint."""

import os
from typing import Any

import numpy as np

from convert import adapters, components, diffusers_dir, kinds, recognition, single_file, text_encoder
from convert.families import COMPONENTS
from convert.rename import ConversionError
from spqr_jax import params as params_lib
from spqr_jax.pipeline import Pipeline


def load(
    source: str | os.PathLike | Pipeline,
    *,
    base: str | os.PathLike | Pipeline | None = None,
    dtype: str = "float32",
    strength: float = 1.0,
) -> Pipeline:
    """Loads a pipeline from any form in which checkpoints are published. The keys show the form (`recognise`).

    Args:
        source: a diffusers directory; a directory or file of one component (UNet, whole or partial, VAE, text
            encoder); a single-file CompVis checkpoint; a LoRA or DoRA (PEFT, diffusers, kohya, legacy processors) or an
            SPM adapter, which are merged into the weights; or "hub:owner/name[@revision][/path inside]", the only form
            that downloads. A Pipeline is returned as it is.
        base: the pipeline, or its source, that a partial source changes.
        dtype: type of every parameter, "float32" or "bfloat16".
        strength: factor of a LoRA or SPM adapter.

    Raises FileNotFoundError if the path does not exist. Raises ConversionError if the content does not fit, with every
    key at fault, or if a base is missing. Raises ValueError for another dtype (float16 overflows in SDXL's VAE).
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
    if kind == kinds.COMPVIS:
        return single_file.load(opened.state, below, source=str(opened.path), dtype=dtype)
    assert below is not None
    return _change(below, opened, dtype=dtype, strength=strength)._replace(name=str(opened.path))


def _change(base: Pipeline, opened: recognition.Source, *, dtype: str, strength: float) -> Pipeline:
    """The base with an adapter merged, or one component replaced."""
    kind, source = opened.recognised.kind, str(opened.path)
    if kind in (kinds.LORA, kinds.SPM):
        return adapters.merge(base, opened.state, config=opened.config, source=source, strength=strength)
    if kind == kinds.TEXT_ENCODER:
        folder = opened.path.name if opened.path.is_dir() else opened.path.parent.name
        return text_encoder.load(base, opened.state, opened.config, source=source, folder=folder, dtype=dtype)
    component = next((name for name in base.params if COMPONENTS[name].kind == kind), None)
    if component is None:
        raise ConversionError(
            f"{source} is {kinds.article(kind)}, which {base.name} does not have (it has {', '.join(base.params)}); "
            "pass a pipeline of the same family with base=...."
        )
    return components.load(base, component, opened.state, opened.config, source=source, dtype=dtype)


def _cast(pipeline: Pipeline, dtype: str) -> Pipeline:
    """The pipeline with every parameter in `dtype`. Arrays that have this type are not copied."""

    def cast(_: str, leaf: Any) -> Any:
        return leaf if leaf.dtype == np.dtype(dtype) else leaf.astype(dtype)

    return pipeline._replace(params={c: params_lib.map_with_path(cast, p) for c, p in pipeline.params.items()})
