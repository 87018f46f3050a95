"""The backbone of a config by its shapes: configs from a directory, or those of a published family. No weights."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from convert.families import COMPONENTS, DENOISERS, FAMILIES
from convert.tensors import read_json
from spqr_jax import backbones, mini
from spqr_jax import params as params_lib
from spqr_jax.config import Config
from spqr_jax.pipeline import Pipeline
from spqr_jax.run import names

# The last part of a directory's or a hub's name -> (family, side of the latents that the denoiser was trained on).
PUBLISHED = {
    "stable-diffusion-v1-4": ("SD1", 64),
    "stable-diffusion-v1-5": ("SD1", 64),
    "stable-diffusion-2-1": ("SD2", 96),
    "stable-diffusion-2-1-base": ("SD2", 64),
    "stable-diffusion-xl-base-1.0": ("SDXL", 128),
    "stable-diffusion-3-medium-diffusers": ("SD3", 128),
    "stable-diffusion-3.5-medium": ("SD3.5 medium", 128),
    "stable-diffusion-3.5-large": ("SD3.5 large", 128),
    "FLUX.1-dev": ("FLUX.1 dev", 128),
    "FLUX.1-schnell": ("FLUX.1 schnell", 128),
}


def pipeline(config: Config) -> Pipeline:
    """The config's backbone with shapes (jax.ShapeDtypeStruct, in the config's dtype) in the place of weights.

    Its tokenizers give zeros. Raises ValueError for a base that is neither "mini", nor a diffusers directory, nor known
    by its name.
    """
    configs = _configs(config.base)
    definitions, params = {}, {}
    for name in (name for name in COMPONENTS if name in configs):
        definitions[name], shapes = backbones.define(name, configs[name])
        params[name] = params_lib.map_with_path(lambda _, leaf: leaf.update(dtype=np.dtype(config.dtype)), shapes)
    tokenizers = {COMPONENTS[name].tokenizer: _no_tokens for name in params if COMPONENTS[name].tokenizer}
    return Pipeline(params, definitions, configs, tokenizers, name=config.base)


def _configs(base: str) -> dict[str, dict[str, Any]]:
    """component (and "scheduler") -> config."""
    folder = mini.model_path() if base == names.MINI else Path(base)
    if folder.is_dir():
        found = {name: folder / name / "config.json" for name in COMPONENTS}
        found["scheduler"] = folder / "scheduler" / "scheduler_config.json"
        return {name: read_json(path) for name, path in found.items() if path.exists()}
    known = PUBLISHED.get(base.rstrip("/").rpartition("/")[2].partition("@")[0])
    if known is None:
        raise ValueError(
            f"config.base={base} is no diffusers directory here, and its name is none of {', '.join(PUBLISHED)}; name "
            "one of these, or a directory with the components' config.json (weights are not needed)."
        )
    family, side = known
    configs = FAMILIES[family].configs
    denoiser = next(name for name in DENOISERS if name in configs)
    return configs | {denoiser: configs[denoiser] | {"sample_size": side}}


def _no_tokens(texts: list[str], *, max_length: int = 1, **_: Any) -> SimpleNamespace:
    """In the place of a tokenizer: zeros [N, max_length]; a word whose tokens are asked for is one."""
    return SimpleNamespace(input_ids=np.zeros((len(texts), max_length), np.int64))
