"""EraseDiff (Wu et al., CVPR 2025): retain, subject to forgetting at its optimum (bilevel, first order)."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from spqr_jax import backbones
from spqr_jax.concepts import Concept
from spqr_jax.methods.base import Method
from spqr_jax.methods.tools import parts, relabelling
from spqr_jax.methods.tools.relabelling import Weighted, inner
from spqr_jax.params import Params
from spqr_jax.pipeline import Pipeline


@dataclass(frozen=True)
class Barrier:
    """retain + lambda * forget, lambda = max(0, eta - <forget, retain> / ||forget||^2): the forget loss falls at least
    as fast as eta times its own steepest descent would make it."""

    eta: float

    def __call__(self, forget: Params, retain: Params) -> Params:
        multiplier = jnp.maximum(0.0, self.eta - inner(forget, retain) / jnp.maximum(inner(forget, forget), 1e-30))
        return jax.tree.map(lambda f, r: r + multiplier.astype(r.dtype) * f, forget, retain)


def align(
    pipeline: Pipeline,
    concept: Concept,
    *,
    seed: int = 0,
    images: int = 400,
    batch_size: int = 16,
    steps: int = 160,
    lr: float = 1e-5,
    multiplier: float | None = None,
    eta: float = 0.5,
    prompts: Mapping[str, str] | None = None,
    pictures: str = "",
    retain_pictures: str = "",
    sampling_steps: int = 100,
    sampling_guidance: float = 7.5,
    progress: bool = False,
) -> Pipeline:
    """min retain loss subject to q = L_f(theta) - L_f(phi^K(theta)) <= 0, phi^K being K steps on the forget loss L_f.

    Update (paper, in BOME's form): grad L_r + lambda grad q, lambda = max(0, (eta ||grad q||^2 - <grad L_r, grad q>) /
    ||grad q||^2). phi^K is a constant in it, so grad q = grad L_f and the K inner steps would change nothing: none are
    taken. L_f and L_r as in `relabelling`; Adam on every UNet weight outside attn2, the time embedding and the output.

    multiplier: a fixed lambda instead, as in the authors' script (1.0 there; theirs also leaves the trace of K = 2
    inner steps in Adam's shared moments, and uses the same 16 images throughout: neither is copied). eta is not
    published; 0.5 is BOME's. prompts: prompt -> caption of the images to forget; default
    `relabelling.NUDITY_PROMPTS`, the authors', for the concept "nudity", else the concept's prompts. These images are
    relabelled to the concept's replacements, for nudity a clothed person; the authors' code has that as a comment, and
    a pokemon in its place. pictures, retain_pictures: your own, as `relabelling.task` takes them. `steps`: "160 is
    enough" (authors). Their number of images is not stated, and they sample with LMS, here DDIM. Raises ValueError
    for SDXL and for fewer `images` than a batch.
    """
    METHOD.check_backbone(pipeline)
    prompts = prompts or relabelling.published_prompts(concept)
    data = relabelling.task(
        "EraseDiff",
        pipeline,
        concept,
        images=images,
        batch_size=batch_size,
        seed=seed,
        prompts=prompts,
        pictures=pictures,
        retain_pictures=retain_pictures,
        sampling_steps=sampling_steps,
        sampling_guidance=sampling_guidance,
    )
    backbone = backbones.of(pipeline)
    weights = backbone.weights(pipeline)
    return relabelling.fit(
        "EraseDiff",
        pipeline,
        weights,
        parts.trained(backbone, weights, "esd-u", "EraseDiff"),
        data,
        Barrier(eta) if multiplier is None else Weighted(multiplier, 1.0),
        lr=lr,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )


METHOD = Method("erasediff", "EraseDiff", align, backbones=("sd",), data_options=("pictures", "retain_pictures"))
