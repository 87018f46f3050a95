"""Adapters in PEFT's form, on the attention projections, that a method trains and merges at the end."""

from collections.abc import Mapping

import numpy as np

from spqr_jax import backbones
from spqr_jax import params as params_lib
from spqr_jax.backbones import Denoiser
from spqr_jax.methods.tools import loop
from spqr_jax.params import Params
from spqr_jax.pipeline import Pipeline
from spqr_jax.training import lora


def adapted(pipeline: Pipeline, rank: int, seed: int, stddev: Mapping[str, float]) -> tuple[Denoiser, Params, Params]:
    """(denoiser with adapters of alpha = rank, adapters, frozen weights).

    stddev: "lora_A" and "lora_B" -> the standard deviation of its first values, Gaussian. A factor that is not named
    starts as in `lora.attach`: A Kaiming-uniform, B zero.
    """
    base = backbones.denoiser(pipeline)
    definition, weights = lora.attach(
        base.definition, base.backbone.weights(pipeline), rank=rank, alpha=rank, dropout=0.0, seed=seed
    )
    rng = np.random.default_rng(seed)

    def leaf(path: str, value):
        scale = next((scale for name, scale in stddev.items() if path.endswith(f".lora.{name}.kernel")), None)
        return value if scale is None else rng.normal(0, scale, value.shape).astype(value.dtype)

    weights = params_lib.map_with_path(leaf, weights)
    adapters = params_lib.map_with_path(lambda path, _: ".lora." in path, weights)
    return base.with_definition(definition), *params_lib.partition(weights, adapters)


def merged(pipeline: Pipeline, adapters: Params, frozen: Params, rank: int) -> Pipeline:
    """The pipeline with adapters of `adapted` folded into its weights."""
    backbone = backbones.of(pipeline)
    folded = lora.merge(loop.on_host(params_lib.merge(frozen, adapters)), alpha=rank)
    return backbone.with_weights(pipeline, params_lib.merge(backbone.weights(pipeline), folded))
