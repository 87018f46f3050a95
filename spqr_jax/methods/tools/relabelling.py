"""What SalUn, EraseDiff and Scissorhands share: forget by relabelling, retain by denoising, and step on both.

Forget loss (SalUn eq. 6): for one noised picture of the concept, predict under its caption c what the current model
predicts under a benign caption c', the latter without gradient. Retain loss: the ordinary denoising loss on pictures of
the benign captions. The methods differ in how the two gradients are combined.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax import params as params_lib
from spqr_jax import pipeline as pipeline_lib
from spqr_jax import schedulers
from spqr_jax.concepts import Concept, completed, require_tokens
from spqr_jax.methods.tools import loop
from spqr_jax.methods.tools import pictures as pictures_lib
from spqr_jax.methods.tools.loop import Adam
from spqr_jax.methods.tools.pictures import Pictures
from spqr_jax.params import Definition, Params
from spqr_jax.pipeline import Pipeline
from spqr_jax.training import objective

# A hashable callable: (gradient of the forget loss, of the retain loss) -> the step's gradient. Programs are kept by
# it, so it must not equal one of another class, as named tuples of the same numbers do.
Combine = Any


@dataclass(frozen=True)
class Weighted:
    """The gradient of forget * forget loss + retain * retain loss."""

    forget: float
    retain: float

    def __call__(self, forget: Params, retain: Params) -> Params:
        return jax.tree.map(lambda f, r: self.forget * f + self.retain * r, forget, retain)


class Static(NamedTuple):
    """What a step is compiled for."""

    definition: Definition
    prediction_type: str
    combine: Combine


class Task(NamedTuple):
    """Pictures and captions of one run."""

    forget: Pictures
    replacement: np.ndarray  # [R, L, E]
    retain: Pictures

    def forget_batch(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """A batch of pictures to forget with `replacement` [B, L, E], the text they are relabelled to."""
        relabelled = self.replacement[self.forget.prompt[rows] % len(self.replacement)]
        return {**self.forget.batch(rows), "replacement": relabelled}


def task(
    name: str,
    pipeline: Pipeline,
    concept: Concept,
    *,
    images: int,
    batch_size: int,
    seed: int,
    prompts: Mapping[str, str] | None = None,
    pictures: str = "",
    retain_pictures: str = "",
    sampling_steps: int,
    sampling_guidance: float,
) -> Task:
    """`images` pictures to forget, as many to retain, made by the base model.

    prompts: prompt -> caption of the pictures to forget (default: the concept's prompts, captioned by themselves).
    pictures, retain_pictures: data sources used instead, under their own captions (`pictures_lib.read`); the pictures
    of the i-th of the captions to forget are relabelled to replacement i (modulo their number). Raises ValueError,
    before any work, for SDXL, for texts without tokens, and for fewer pictures than a batch holds.
    """
    loop.check_backbone(name, pipeline)
    loop.check_at_least(name, batch_size=(batch_size, 1))
    full = completed(concept, pipeline, "replacements")
    prompts = prompts or {text: text for text in full.prompts}
    require_tokens(name, "prompts", [*prompts, *prompts.values()], pipeline)
    pictures_lib.check_given(retain_pictures, images, f"{name}: retain_pictures")
    options: dict[str, Any] = {
        "least": batch_size,
        "name": name,
        "steps": sampling_steps,
        "guidance": sampling_guidance,
    }
    # Different seeds: pictures to forget and to retain must not share their noise.
    forget = pictures_lib.make(
        pipeline, list(prompts), images, seed=2 * seed, captions=list(prompts.values()), given=pictures, **options
    )
    options |= {"given": retain_pictures, "option": "retain_pictures"}
    retain = pictures_lib.make(pipeline, full.replacements, images, seed=2 * seed + 1, **options)
    return Task(forget, np.asarray(pipeline_lib.encode_prompts(pipeline, list(full.replacements)).context), retain)


def forget_loss(unet: Any, noisy: jax.Array, t: jax.Array, context: jax.Array, replacement: jax.Array) -> jax.Array:
    """Mean squared error of the predictions for noisy latents [B, h, w, C] under two texts [B, L, E]; no gradient
    through the second."""
    wanted = jax.lax.stop_gradient(unet(noisy, t, replacement))
    return jnp.square((unet(noisy, t, context) - wanted).astype(jnp.float32)).mean()


def gradient(static: Static, params: Params, rest: Params, alphas, forget, retain, key) -> tuple[jax.Array, Params]:
    """(sum of both losses, combined gradient) at trained leaves `params` and frozen `rest`."""
    keys = jax.random.split(key)

    def forgetting(trained):
        latents, noise, t = objective.draw(keys[0], forget["mean"], forget["std"], len(alphas))
        noisy = schedulers.ddpm.add_noise(alphas, latents, noise, t)
        unet = static.definition.bind(params_lib.merge(rest, trained))
        return forget_loss(unet, noisy, t, forget["context"], forget["replacement"])

    def retaining(trained):
        drawn = objective.draw(keys[1], retain["mean"], retain["std"], len(alphas))
        unet = static.definition.bind(params_lib.merge(rest, trained))
        return objective.denoising_loss(unet, retain, *drawn, alphas, static.prediction_type)

    forgotten, forget_grads = jax.value_and_grad(forgetting)(params)
    retained, retain_grads = jax.value_and_grad(retaining)(params)
    return forgotten + retained, static.combine(forget_grads, retain_grads)


def fit(
    name: str,
    pipeline: Pipeline,
    unet: Params,
    trained: Params,
    data: Task,
    combine: Combine,
    *,
    lr: float,
    steps: int,
    batch_size: int,
    seed: int,
    mask: Params | None = None,
    progress: bool = False,
) -> Pipeline:
    """Train `unet` where the tree of bool `trained` says (and, within, where the element mask `mask` does)."""
    train, rest = params_lib.partition(loop.on_device(unet), trained)
    mask = None if mask is None else params_lib.partition(loop.on_device(mask), trained)[0]
    alphas, base = loop.signal_powers(pipeline), jax.random.key(seed)
    forget = list(pictures_lib.rows(data.forget, batch_size, steps, 2 * seed))
    retain = list(pictures_lib.rows(data.retain, batch_size, steps, 2 * seed + 1))

    def inputs(i: int, params: Params):
        del params
        return rest, alphas, data.forget_batch(forget[i]), data.retain.batch(retain[i]), jax.random.fold_in(base, i)

    static = Static(pipeline.definitions["unet"], loop.prediction_type(pipeline), combine)
    tuned = loop.fit(name, gradient, static, Adam(lr), train, inputs, steps, mask=mask, progress=progress)
    return pipeline.with_params(unet=loop.on_host(params_lib.merge(unet, tuned)))


def everything(unet: Params) -> Params:
    """A mask that trains every leaf."""
    return jax.tree.map(lambda _: True, unet)
