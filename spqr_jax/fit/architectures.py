"""The backbone of a config by its shapes: configs from a directory, or those of a published family. No weights."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from convert.families import COMPONENTS, DENOISERS, FAMILIES
from convert.tensors import read_json
from spqr_jax import backbones
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
WORD = re.compile(r"\w+|[^\w\s]")


def pipeline(config: Config) -> Pipeline:
    """The config's backbone with shapes (jax.ShapeDtypeStruct, in the config's dtype) in the place of weights.

    Its tokenizers are `Words`. Raises ValueError for a base that is neither the emoji world's, nor a diffusers
    directory, nor known by its name.
    """
    configs = _configs(config.base)
    definitions, params = {}, {}
    for name in (name for name in COMPONENTS if name in configs):
        definitions[name], shapes = backbones.define(name, configs[name])
        params[name] = params_lib.map_with_path(lambda _, leaf: leaf.update(dtype=np.dtype(config.dtype)), shapes)
    tokenizers = {COMPONENTS[name].tokenizer: Words() for name in params if COMPONENTS[name].tokenizer}
    return Pipeline(params, definitions, configs, tokenizers, name=config.base)


def _configs(base: str) -> dict[str, dict[str, Any]]:
    """component (and "scheduler") -> config."""
    folder = names.weights_path(base) if names.is_shipped(base) else Path(base)
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


class Words:
    """In the place of a tokenizer, for shapes: every distinct word is a token, between a start and an end.

    Attributes:
        eos_token_id: the end, and the padding.
    """

    eos_token_id = 1

    def __init__(self) -> None:
        self._known = {"a start": 0, "an end": self.eos_token_id}  # no words, as they have spaces

    def __call__(self, texts: str | list[str], *, add_special_tokens: bool = True, **how: Any) -> SimpleNamespace:
        """Token ids of a text, or of several: a list each, or int64 [N, max_length] with padding="max_length"."""
        if isinstance(texts, str):
            return SimpleNamespace(input_ids=self._ids(texts, add_special_tokens))
        ids = [self._ids(text, add_special_tokens) for text in texts]
        if how.get("padding") != "max_length":
            return SimpleNamespace(input_ids=ids)
        length = how["max_length"]
        rows = [row[: length - 1] + [self.eos_token_id] * max(1, length - len(row)) for row in ids]
        return SimpleNamespace(input_ids=np.array(rows, np.int64).reshape(len(rows), length))

    def _ids(self, text: str, ends: bool) -> list[int]:
        words = [self._known.setdefault(word, len(self._known)) for word in WORD.findall(text.lower())]
        return [0, *words, self.eos_token_id] if ends else words
