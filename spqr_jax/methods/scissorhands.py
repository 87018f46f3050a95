"""Scissorhands (Wu & Harandi, ECCV 2024): re-initialise the weights most connected to the concept, then repair."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax import backbones
from spqr_jax import params as params_lib
from spqr_jax.backbones import Denoiser
from spqr_jax.concepts import Concept
from spqr_jax.methods.base import Method
from spqr_jax.methods.tools import element_mask, gradients, loop, parts, relabelling
from spqr_jax.methods.tools import pictures as pictures_lib
from spqr_jax.methods.tools.relabelling import Task, Weighted, inner
from spqr_jax.params import Params
from spqr_jax.pipeline import Pipeline
from spqr_jax.training.objective import denoising_loss


@dataclass(frozen=True)
class Projection:
    """retain + v * forget, v = max(margin, -<forget, retain> / (||forget||^2 + 1e-3)): GEM's projection with one
    memory, so that a step on the retain loss also forgets."""

    margin: float = 0.5

    def __call__(self, forget: Params, retain: Params) -> Params:
        v = jnp.maximum(self.margin, -inner(forget, retain) / (inner(forget, forget) + 1e-3))
        return jax.tree.map(lambda f, r: r + v.astype(r.dtype) * f, forget, retain)


def align(
    pipeline: Pipeline,
    concept: Concept,
    *,
    seed: int = 0,
    images: int = 400,
    batch_size: int = 16,
    steps: int = 100,
    lr: float = 1e-5,
    sparsity: float = 0.995,
    prune_batches: int = 10,
    repair: str = "projection",
    forget_weight: float = 0.1,
    reset: re.Pattern | None = None,
    prompts: Mapping[str, str] | None = None,
    pictures: str = "",
    retain_pictures: str = "",
    sampling_steps: int = 100,
    sampling_guidance: float = 7.5,
    progress: bool = False,
) -> Pipeline:
    """Trim by connection sensitivity (SNIP), then repair on benign images without undoing the forgetting.

    Sensitivity: |w| * sum over `prune_batches` of |gradient of the denoising loss on the concept's images|. Of all
    UNet weights the share 1 - `sparsity` with the largest is chosen, but only those whose path matches `reset` are
    drawn anew, Kaiming-uniform (biases zero), as in the authors' code. Then Adam trains every UNet weight.

    repair: "projection" (paper): the gradient of the retain loss, projected against that of the forget loss; "sum"
    (the authors' Stable Diffusion script, which never calls its projection): retain + `forget_weight` * forget. Losses
    as in `relabelling`; prompts and images as in `erasediff`. The released weights are of about 100 steps; the
    script's use of the same first batch throughout is not copied. Raises ValueError for SDXL, for fewer `images` than
    a batch, and for a UNet without the layers to reset.
    """
    METHOD.check_backbone(pipeline)
    if repair not in ("projection", "sum"):
        raise ValueError(f'Scissorhands: repair must be "projection" or "sum", found {repair!r}.')
    loop.check_at_least("Scissorhands", prune_batches=(prune_batches, 1))
    element_mask.check_share("Scissorhands: sparsity", sparsity)
    backbone = backbones.of(pipeline)
    weights, reset = backbone.weights(pipeline), reset or backbone.require("reset", "Scissorhands")
    if not any(reset.search(path) for path in params_lib.flatten(weights)):
        raise ValueError(f"Scissorhands: no UNet weight matches {reset.pattern!r}; pass `reset` for this backbone.")
    data = relabelling.task(
        "Scissorhands",
        pipeline,
        concept,
        images=images,
        batch_size=batch_size,
        seed=seed,
        prompts=prompts or relabelling.published_prompts(concept),
        pictures=pictures,
        retain_pictures=retain_pictures,
        sampling_steps=sampling_steps,
        sampling_guidance=sampling_guidance,
    )
    scores = sensitivity(pipeline, data, prune_batches, batch_size, seed, progress)
    chosen = element_mask.top(scores, 1 - sparsity)
    return relabelling.fit(
        "Scissorhands",
        pipeline,
        reinitialised(weights, chosen, reset, seed),
        parts.everything(weights),
        data,
        Projection() if repair == "projection" else Weighted(forget_weight, 1.0),
        lr=lr,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )


def sensitivity(
    pipeline: Pipeline, data: Task, batches: int, batch_size: int, seed: int, progress: bool = False
) -> Params:
    """|w| * sum over batches of |gradient of the denoising loss on the images to forget|, like the UNet."""
    schedule, base = backbones.schedule(pipeline), jax.random.key(seed + 1)
    order = list(pictures_lib.rows(data.forget, batch_size, batches, seed + 1))
    weights, denoiser = backbones.of(pipeline).weights(pipeline), backbones.denoiser(pipeline)

    def inputs(i: int):
        return schedule, data.forget.batch(order[i]), jax.random.fold_in(base, i)

    name = "Scissorhands sum of gradients"
    total = gradients.summed(name, denoising, denoiser, weights, inputs, batches, absolute=True, progress=progress)
    return jax.tree.map(lambda w, g: jnp.abs(w) * g, weights, total)


def denoising(denoiser: Denoiser, params: Params, schedule, batch, key) -> jax.Array:
    """The ordinary loss on images under their captions."""
    drawn = denoiser.draw(key, batch["mean"], batch["std"], schedule)
    return denoising_loss(denoiser, denoiser.bind(params), batch["condition"], drawn, schedule)


def reinitialised(weights: Params, chosen: Params, reset: re.Pattern, seed: int) -> Params:
    """The UNet with the chosen elements of the leaves that `reset` names drawn anew: kernels [in, out] from
    U(-b, b), b = sqrt(6 / in) (Kaiming for ReLU), biases zero."""
    mask = params_lib.flatten(chosen)
    rng = np.random.default_rng(seed)

    def leaf(path: str, value):
        value = np.asarray(value)
        if not reset.search(path):
            return value
        fresh = np.zeros_like(value)
        if path.endswith(".kernel"):
            bound = math.sqrt(6 / value.shape[0])
            fresh = rng.uniform(-bound, bound, value.shape).astype(value.dtype)
        return np.where(mask[path], fresh, value)

    return params_lib.map_with_path(leaf, weights)


METHOD = Method("scissorhands", "Scissorhands", align, backbones=("sd",), data_options=("pictures", "retain_pictures"))
