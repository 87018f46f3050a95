"""Negative guidance (ESD's loss): learn the prediction that is pushed away from a concept's text."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax import backbones
from spqr_jax.backbones import Condition, Denoiser
from spqr_jax.backbones.base import Predict
from spqr_jax.concepts import Concept
from spqr_jax.methods.tools import loop
from spqr_jax.methods.tools.loop import Adam
from spqr_jax.params import Params
from spqr_jax.pipeline import Pipeline
from spqr_jax.sampling import partial


class Course(NamedTuple):
    """How long ESD's loss is trained for, and on which samples."""

    seed: int
    steps: int
    eta: float
    batch_size: int
    sampling_steps: int
    sampling_guidance: float
    progress: bool


class Static(NamedTuple):
    """What a step is compiled for: the denoiser, and (frozen weights, trained) -> the student's weights."""

    denoiser: Denoiser
    build: Callable[[Params, Any], Params]


def fit(
    name: str,
    pipeline: Pipeline,
    concept: Concept,
    build: Callable[[Params, Any], Params],
    frozen: Params,
    params: Any,
    adam: Adam,
    course: Course,
) -> Any:
    """`params` after ESD's loss, where build(frozen, params) is the student's weights."""
    sampler = partial.sampler(pipeline, course.sampling_steps, course.sampling_guidance)
    texts, size = encode(pipeline, concept.erase), course.batch_size

    def inputs(i: int, params: Any, frozen: Params):
        rng = np.random.default_rng((course.seed, i))
        positive = texts.rows(rng.integers(len(concept.erase), size=size))
        empty = texts.rows(np.full(size, -1))
        k = int(rng.integers(sampler.steps))
        # After `steps - 1 - k` steps the latents stand at the timestep of step k counted from the clean end.
        latents = partial.walk(sampler, build(frozen, params), positive, empty, sampler.steps - 1 - k, rng)
        return latents, sampler.times(k, size, rng), positive, empty, np.float32(course.eta)

    static, name, held = Static(sampler.denoiser, build), f"{name} {concept.name}", (frozen,)
    return loop.fit(name, GRADIENT, static, adam, params, inputs, course.steps, frozen=held, progress=course.progress)


def encode(pipeline: Pipeline, prompts: tuple[str, ...]) -> Condition:
    """The prompts and, last, no text, as sampling without a prompt has it."""
    return backbones.condition(pipeline, [*prompts, ""], unconditional=(-1,))


def erasing_loss(student: Predict, frozen: Predict, latents, t, text: Condition, empty: Condition, eta) -> jax.Array:
    """Mean squared error of the student under the text and "" - eta (text - ""), both of the frozen denoiser."""
    conditional, unconditional = frozen(latents, t, text), frozen(latents, t, empty)
    target = jax.lax.stop_gradient(unconditional - eta * (conditional - unconditional))
    return jnp.square(student(latents, t, text) - target).mean()


def loss(static: Static, params: Any, frozen: Params, latents, t, positive: Condition, empty: Condition, eta):
    """`erasing_loss` of the weights that are built from the frozen and the trained ones."""
    student, teacher = static.denoiser.bind(static.build(frozen, params)), static.denoiser.bind(frozen)
    return erasing_loss(student, teacher, latents, t, positive, empty, eta)


# What `fit` trains with; compiled programs are kept by it.
GRADIENT = loop.descent(loss)
