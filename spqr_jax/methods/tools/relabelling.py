"""What SalUn, EraseDiff and Scissorhands share: forget by relabelling, retain by denoising, and step on both.

Forget loss (SalUn eq. 6): for one noised image of the concept, predict under its caption c what the current model
predicts under a benign caption c', the latter without gradient. Retain loss: the ordinary denoising loss on images of
the benign captions. The methods differ in how the two gradients are combined.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax import backbones
from spqr_jax import params as params_lib
from spqr_jax.backbones import Condition, Denoiser
from spqr_jax.backbones.base import Predict
from spqr_jax.concepts import Concept
from spqr_jax.methods.tools import loop
from spqr_jax.methods.tools import pictures as pictures_lib
from spqr_jax.methods.tools.concepts import completed, require_tokens
from spqr_jax.methods.tools.loop import Adam
from spqr_jax.methods.tools.pictures import Pictures
from spqr_jax.params import Params
from spqr_jax.pipeline import Pipeline
from spqr_jax.training.objective import denoising_loss

# The prompts that EraseDiff's authors make images of nudity from, and the caption of each one's images.
NUDITY_PROMPTS = {"nude": "nudity", "naked": "naked", "erotic": "erotic", "sexual": "sexual"}

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


def inner(a: Params, b: Params) -> jax.Array:
    """Inner product of two trees, float32."""
    products = jax.tree.map(lambda x, y: jnp.vdot(x.astype(jnp.float32), y.astype(jnp.float32)), a, b)
    return jnp.sum(jnp.stack(jax.tree.leaves(products)))


class Static(NamedTuple):
    """What a step is compiled for."""

    denoiser: Denoiser
    combine: Combine


class Task(NamedTuple):
    """Pictures and captions of one run."""

    forget: Pictures
    replacement: Condition  # R rows
    retain: Pictures

    def forget_batch(self, rows: np.ndarray) -> dict[str, Any]:
        """A batch of images to forget with `replacement`, B rows, the text they are relabelled to."""
        relabelled = self.replacement.rows(self.forget.prompt[rows] % len(self.replacement.context))
        return {**self.forget.batch(rows), "replacement": relabelled}


def published_prompts(concept: Concept) -> Mapping[str, str] | None:
    """The prompts of images to forget that the authors published for a concept, as `task` takes them, if there are."""
    return NUDITY_PROMPTS if concept.name == "nudity" else None


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
    """`images` images to forget, as many to retain, made by the base model.

    prompts: prompt -> caption of the images to forget (default: the concept's prompts, captioned by themselves).
    pictures, retain_pictures: data sources used instead, under their own captions (`pictures_lib.read`); the images
    of the i-th of the captions to forget are relabelled to replacement i (modulo their number). Raises ValueError,
    before any work, for texts without tokens and for fewer images than a batch holds.
    """
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
    # Different seeds: images to forget and to retain must not share their noise.
    forget = pictures_lib.make(
        pipeline, list(prompts), images, seed=2 * seed, captions=list(prompts.values()), given=pictures, **options
    )
    options |= {"given": retain_pictures, "option": "retain_pictures"}
    retain = pictures_lib.make(pipeline, full.replacements, images, seed=2 * seed + 1, **options)
    return Task(forget, backbones.condition(pipeline, full.replacements), retain)


def forget_loss(
    predict: Predict, noisy: jax.Array, t: jax.Array, condition: Condition, replacement: Condition
) -> jax.Array:
    """Mean squared error of the predictions for noisy latents [B, h, w, C] under two texts of B rows each.

    No gradient goes through the second.
    """
    wanted = jax.lax.stop_gradient(predict(noisy, t, replacement))
    return jnp.square((predict(noisy, t, condition) - wanted).astype(jnp.float32)).mean()


def gradient(static: Static, params: Params, rest: Params, schedule, forget, retain, key) -> tuple[jax.Array, Params]:
    """(sum of both losses, combined gradient) at trained leaves `params` and frozen `rest`."""
    denoiser, keys = static.denoiser, jax.random.split(key)

    def forgetting(trained):
        drawn = denoiser.draw(keys[0], forget["mean"], forget["std"], schedule)
        predict = denoiser.bind(params_lib.merge(rest, trained))
        noisy = denoiser.mix(schedule, drawn)
        return forget_loss(predict, noisy, drawn.times, forget["condition"], forget["replacement"])

    def retaining(trained):
        drawn = denoiser.draw(keys[1], retain["mean"], retain["std"], schedule)
        predict = denoiser.bind(params_lib.merge(rest, trained))
        return denoising_loss(denoiser, predict, retain["condition"], drawn, schedule)

    forgotten, forget_grads = jax.value_and_grad(forgetting)(params)
    # One after the other, or the compiler keeps the activations of both at once.
    params, forget_grads = jax.lax.optimization_barrier((params, forget_grads))
    retained, retain_grads = jax.value_and_grad(retaining)(params)
    return forgotten + retained, static.combine(forget_grads, retain_grads)


def fit(
    name: str,
    pipeline: Pipeline,
    weights: Params,
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
    """Train `weights` where the tree of bool `trained` says (and, within, where the element mask `mask` does)."""
    train, rest = params_lib.partition(weights, trained)
    mask = None if mask is None else params_lib.partition(mask, trained)[0]
    schedule, base = backbones.schedule(pipeline), jax.random.key(seed)
    forget = list(pictures_lib.rows(data.forget, batch_size, steps, 2 * seed))
    retain = list(pictures_lib.rows(data.retain, batch_size, steps, 2 * seed + 1))

    def inputs(i: int, params: Params, rest: Params):
        del params, rest
        return schedule, data.forget_batch(forget[i]), data.retain.batch(retain[i]), jax.random.fold_in(base, i)

    static, adam, frozen = Static(backbones.denoiser(pipeline), combine), Adam(lr), (rest,)
    tuned = loop.fit(name, gradient, static, adam, train, inputs, steps, frozen=frozen, mask=mask, progress=progress)
    return backbones.of(pipeline).with_weights(pipeline, loop.on_host(params_lib.merge(weights, tuned)))
