"""One component of a pipeline: its model from a config, and its replacement by the weights of a file."""

import functools
import json
from collections.abc import Mapping
from typing import Any

from convert import bfl, ldm, marks, rename
from convert.families import COMPONENTS, DENOISERS
from convert.rename import ConversionError
from spqr_jax import backbones
from spqr_jax import params as params_lib
from spqr_jax.params import Definition, Params
from spqr_jax.pipeline import Pipeline

# A denoiser's file that lacks some leaves and has more than this share of them is damaged. Partial checkpoints of
# methods lack more: cross-attention, everything else, or the norms.
NEARLY_ALL = 0.9


def define(component: str, config: dict[str, Any]) -> tuple[Definition, Params]:
    """As `backbones.define`, but traced once per config, since a run loads many checkpoints of one architecture."""
    return _define(component, json.dumps(config, sort_keys=True))


@functools.lru_cache(maxsize=16)
def _define(component: str, config: str) -> tuple[Definition, Params]:
    return backbones.define(component, json.loads(config))


def replace(
    pipeline: Pipeline, component: str, params: Params, definition: Definition, config: dict[str, Any]
) -> Pipeline:
    """The pipeline with one component's weights, model and config replaced."""
    return pipeline._replace(
        params={**pipeline.params, component: params},
        definitions={**pipeline.definitions, component: definition},
        configs={**pipeline.configs, component: config},
    )


def load(
    pipeline: Pipeline,
    component: str,
    state: Mapping[str, Any],
    config: dict[str, Any] | None,
    *,
    source: str,
    dtype: str,
) -> Pipeline:
    """The pipeline with the weights of its denoiser or VAE replaced by those of a state dict.

    config: the config.json beside the weights, or None. With a config the weights must be complete; without one a
    denoiser may also be replaced in part. Raises ConversionError if keys or config do not fit the pipeline.
    """
    is_denoiser = component in DENOISERS
    if is_denoiser:
        marks.check(pipeline, state, source)
        state = bfl.separated(state) if any(bfl.is_key(key) for key in state) else state
    ours = pipeline.configs[component]
    used = config or ours
    for field in COMPONENTS[component].interface:
        if used.get(field, ours.get(field)) != ours.get(field):
            raise ConversionError(
                f"{source} does not fit the {component} of {pipeline.name}: {field}={used[field]!r}, expected "
                f"{ours.get(field)!r}; pass a pipeline of the same family with base=...."
            )
    definition, skeleton = define(component, used)
    whole = len(params_lib.flatten(skeleton))
    partial = is_denoiser and config is None and len(state) <= NEARLY_ALL * whole
    name = ldm.namer(component, used) if any(ldm.is_vae_key(key) for key in state) else _name(component)
    params = rename.from_torch(
        state, skeleton, component=component, source=source, partial=partial, dtype=dtype, name=name
    )
    if partial:
        params = params_lib.merge(pipeline.params[component], params)
    return replace(pipeline, component, params, definition, used)


def _name(component: str):
    def name(key: str) -> str:
        bare = key.removeprefix("module.").removeprefix(f"{component}.")
        return bfl.name(bare) if bfl.is_key(bare) else rename.modern_name(bare, component)

    return name
