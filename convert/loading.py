"""`load`: one entry for every kind of checkpoint."""

import os
from pathlib import Path

from convert import diffusers_dir
from convert.rename import ConversionError
from spqr_jax.pipeline import Pipeline


def load(source: str | os.PathLike | Pipeline, *, base=None, dtype: str = "float32") -> Pipeline:
    """Load a pipeline.

    Args:
        source: a diffusers directory.
        base: the pipeline (or its source) that a partial checkpoint changes.
        dtype: "float32" or "bfloat16", of every parameter.

    Raises FileNotFoundError when the path does not exist, ConversionError when the content does not fit, ValueError
    for another dtype (float16 overflows in SDXL's VAE).
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f'dtype must be "float32" or "bfloat16", found {dtype!r}.')
    if isinstance(source, Pipeline):
        return source
    path = Path(source)
    if path.is_dir() and (path / "model_index.json").exists():
        return diffusers_dir.load_pipeline(path, dtype=dtype)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a diffusers directory.")
    raise ConversionError(f"{path} is not a diffusers directory (no model_index.json).")
