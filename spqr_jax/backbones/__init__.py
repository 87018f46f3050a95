"""Backbones: one file an architecture, each a `Backbone` that owns what only this architecture knows.

A backbone gives the name of its denoiser, the part that each of its weights plays, the way from texts to a condition,
and the noising process of its training. This room may know parameters, pipelines and schedulers. It knows nothing of
methods, profiles or runs.
"""

from collections.abc import Sequence
from typing import Any

import flax.nnx as nnx
import jax
import numpy as np
from jax.sharding import Mesh

from spqr_jax import params as params_lib
from spqr_jax.backbones import many, models
from spqr_jax.backbones.base import Backbone, Condition, Denoiser, Regions, TextEncoding
from spqr_jax.backbones.flux import FLUX
from spqr_jax.backbones.noising import Drawn, Noising
from spqr_jax.backbones.sd3 import SD3
from spqr_jax.backbones.sdxl import SDXL
from spqr_jax.backbones.stable_diffusion import STABLE_DIFFUSION
from spqr_jax.devices import target as target_lib
from spqr_jax.devices.target import Target
from spqr_jax.params import Definition, Params
from spqr_jax.pipeline import Pipeline, tokenize

# A new architecture adds its row here.
BACKBONES = (STABLE_DIFFUSION, SDXL, SD3, FLUX)

# The model classes that a diffusers model_index.json may name.
MODEL_CLASSES = {
    model.__name__: model
    for model in (
        models.UNet2DConditionModel,
        models.AutoencoderKL,
        models.CLIPTextModel,
        models.CLIPTextModelWithProjection,
        models.T5EncoderModel,
        models.SD3Transformer2DModel,
        models.FluxTransformer2DModel,
    )
}
# The class of a component whose config names none of these.
USUAL_CLASSES = {
    "unet": "UNet2DConditionModel",
    "vae": "AutoencoderKL",
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "text_encoder_3": "T5EncoderModel",
}

__all__ = ["BACKBONES", "Backbone", "Condition", "Denoiser", "Drawn", "Noising", "Regions", "TextEncoding"]


def define(component: str, config: dict[str, Any]) -> tuple[Definition, Params]:
    """The definition and the shapes (jax.ShapeDtypeStruct) of one component, from its config. Nothing is allocated.

    The model is compiled for what this process computes on, unless `told` otherwise.
    """
    target = target_lib.here()

    def make() -> nnx.Module:
        model = MODEL_CLASSES[class_name(component, config)](config, rngs=params_lib.OneKey())
        model.set_attributes(target=target)
        return model

    return params_lib.skeleton(make)


def class_name(component: str, config: dict[str, Any]) -> str:
    """The class of a component: that of its config, in diffusers' or transformers' form, else the usual one.

    Raises ValueError for a component that has no usual class, if its config names none that is known.
    """
    named = [config.get("_class_name"), *(config.get("architectures") or [])]
    known = next((name for name in named if name in MODEL_CLASSES), USUAL_CLASSES.get(component))
    if known is None:
        raise ValueError(
            f"{component} config: class {named[0]!r} is unknown; expected one of {', '.join(MODEL_CLASSES)}."
        )
    return known


def told(pipeline: Pipeline, target: Target) -> Pipeline:
    """The pipeline with models that are compiled for a target, which need not be what this process computes on."""
    definitions = {}
    for name, definition in pipeline.definitions.items():
        model = definition.bind(pipeline.params[name])  # shapes do as well; weights are not read
        model.set_attributes(target=target, raise_if_not_found=False)
        definitions[name] = params_lib.split(model)[0]
    return pipeline._replace(definitions=definitions)


def on(pipeline: Pipeline, mesh: Mesh) -> Pipeline:
    """The pipeline with models that know the devices of a mesh, where a kernel must know them (several TPU chips)."""
    target = target_lib.of(mesh)
    return pipeline if target.mesh is None else told(pipeline, target)


def of(pipeline: Pipeline) -> Backbone:
    """The backbone with the components of a pipeline. Raises ValueError that lists them if no backbone has these."""
    for backbone in BACKBONES:
        if _fits(backbone, pipeline):
            return backbone
    raise ValueError(
        f"{pipeline.name or 'the pipeline'} has the components {', '.join(sorted(pipeline.params))}; expected those of "
        f"one of {', '.join(backbone.name for backbone in BACKBONES)}."
    )


def check_defined(title: str, kind: str, keys: Sequence[str], pipeline: Pipeline) -> None:
    """Raise ValueError unless the backbone of a pipeline is one of `keys` (`Backbone.key`). No keys: every one passes.

    title, kind: of that which is defined for these, in messages: "UCE", "method".
    """
    backbone = of(pipeline)
    if keys and backbone.key not in keys:
        known = ", ".join(known.name for known in BACKBONES if known.key in keys)
        raise ValueError(
            f"{title} is not defined for {backbone.name}, only for {known}; choose another {kind}, or another backbone."
        )


def _fits(backbone: Backbone, pipeline: Pipeline) -> bool:
    """Whether a pipeline has the components of a backbone, and the class of its denoiser where that is named."""
    if not set(backbone.components) - set(backbone.optional) <= set(pipeline.params) <= set(backbone.components):
        return False
    named = backbone.denoiser_class
    return named is None or class_name(backbone.denoiser, pipeline.configs[backbone.denoiser]) == named


def regions(params: Params) -> Regions:
    """The regions of a denoiser's weights: those of the backbone whose region "lora" matches most of the paths.

    params: the weights of a denoiser, or of all components of a pipeline. Every region is None if no backbone matches.
    """
    found, most = Regions(), 0
    for backbone in BACKBONES:
        own = params.get(backbone.denoiser, params)
        pattern = backbone.regions.lora
        count = sum(bool(pattern and pattern.search(path)) for path in params_lib.flatten(own))
        if count > most:
            found, most = backbone.regions, count
    return found


def denoiser(pipeline: Pipeline) -> Denoiser:
    """The denoiser of a pipeline without its weights."""
    backbone = of(pipeline)
    return Denoiser(backbone, pipeline.definitions[backbone.denoiser], prediction(pipeline))


def prediction(pipeline: Pipeline) -> str:
    """The kind of the denoiser's prediction: "epsilon" (noise), "v_prediction" (velocity) or "flow" (noise - x_0)."""
    return of(pipeline).noising.prediction or pipeline.configs["scheduler"].get("prediction_type", "epsilon")


def schedule(pipeline: Pipeline) -> jax.Array:
    """The noise schedule that the denoiser was trained with (`Noising.schedule`)."""
    return of(pipeline).noising.schedule(pipeline.configs["scheduler"])


def condition(
    pipeline: Pipeline,
    texts: Sequence[str],
    *,
    size: tuple[int, int] | None = None,
    unconditional: Sequence[int] = (),
) -> Condition:
    """`Backbone.condition` for images of `size` pixels, default the size that the denoiser was trained at.

    On the host. The states of many texts of T5 are encoded in blocks, and memory-mapped if they are large.
    """
    backbone = of(pipeline)
    size = size or (backbone.side(pipeline),) * 2
    if backbone.lengths is None or not texts:
        return jax.tree.map(np.asarray, backbone.condition(pipeline, texts, size, unconditional))
    return many.in_blocks(lambda block, rows: backbone.condition(pipeline, block, size, rows), texts, unconditional)


def token_condition(pipeline: Pipeline, texts: Sequence[str], *, size: tuple[int, int]) -> Condition:
    """As `condition`, with token ids int32 [N, encoders, L] in the place of text states, for trained text encoders."""
    backbone = of(pipeline)
    assert backbone.text is not None  # the caller has text encoders to train
    names = [encoder.replace("text_encoder", "tokenizer") for encoder in backbone.text.encoders]
    ids = np.stack([tokenize(pipeline, list(texts), name) for name in names], axis=1)
    return backbone.resized(Condition(ids), size)
