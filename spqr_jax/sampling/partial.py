"""Latents part of the way from noise to an image, for methods that train on them."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from spqr_jax import backbones, schedulers
from spqr_jax.backbones import Condition, Denoiser
from spqr_jax.devices import mesh as mesh_lib
from spqr_jax.params import Params
from spqr_jax.pipeline import Pipeline
from spqr_jax.sampling.guidance import Guided, guided_prediction


class Sampler(NamedTuple):
    """Guided, deterministic sampling of `steps` steps, with DDIM or, for flow transformers, Euler's method.

    DDIM's timesteps are `span` apart; those of flow are fractions, and `span` is 0. Latents are [B, *shape]. guidance:
    the scale of classifier-free guidance. told: the scale that a guidance-distilled denoiser reads, or None.
    """

    denoiser: Denoiser
    tables: Any
    shape: tuple[int, int, int]
    steps: int
    span: int
    guidance: float
    told: float | None = None

    def times(self, k: int, size: int, rng: np.random.Generator) -> np.ndarray:
        """Times [size] of latents at step k, counted from the clean end: any within it (DDIM), or its own (flow)."""
        if not self.span:
            return np.full(size, self.tables.timesteps[self.steps - 1 - k], np.float32)
        return rng.integers(k * self.span, (k + 1) * self.span, size=size).astype(np.int32)


def sampler(pipeline: Pipeline, steps: int, guidance: float) -> Sampler:
    """`Backbone.sampler` over the pipeline's schedule, at the size that the denoiser was trained at.

    Raises ValueError for a scale of guidance that the backbone does not have.
    """
    backbone, config = backbones.of(pipeline), pipeline.configs["scheduler"]
    size = (backbone.side(pipeline),) * 2
    spacing = backbone.spacing(pipeline, size)
    tables = schedulers.create(backbone.sampler, {**config, "clip_sample": False}, steps, spacing)
    span = int(config.get("num_train_timesteps", 1000)) // steps if backbone.sampler == "ddim" else 0
    shape = backbone.latent_shape(pipeline, size)
    told, free = backbone.guidance(pipeline, np.array([guidance], np.float32))
    scales = float(free[0]), None if told is None else float(told[0])
    return Sampler(backbones.denoiser(pipeline), tables, shape, steps, span, *scales)


def partial_sample(
    denoiser: Denoiser,
    params: Params,
    tables: Any,
    noise: jax.Array | np.ndarray,
    given: Guided,
    stop: int,
    guided: bool,
) -> jax.Array:
    """Latents [B, h, w, C] after `stop` steps from `noise`. One program serves all numbers of steps.

    params: if they are split over devices, every device gathers them in each step and computes the same.
    guided: whether there is classifier-free guidance.
    """
    split = mesh_lib.split_over(params)
    if split:
        noise, given, stop = mesh_lib.replicate((noise, given, np.int32(stop)), split)
    return _partial_sample(denoiser, params, tables, noise, given, stop, guided, split)


@functools.partial(jax.jit, static_argnums=(0, 6, 7))
def _partial_sample(denoiser, params, tables, noise, given, stop, guided: bool, split: Mesh | None) -> jax.Array:
    def body(i, carry):
        latents, state = carry
        whole = mesh_lib.constrain(mesh_lib.each_turn(params, latents), split, fsdp=False) if split else params
        predict = denoiser.bind(whole)
        t = jnp.asarray(tables.timesteps)[i]
        output = guided_prediction(predict, given, guided, tables.scale_input(latents, i), t)
        return tables.step(state, output, i, latents)

    start = noise.astype(jnp.float32) * tables.init_noise_sigma
    latents = jax.lax.fori_loop(0, stop, body, (start, tables.init_state(start)))[0]
    return mesh_lib.constrain(latents, split, fsdp=False) if split else latents


def walk(
    sampler: Sampler, params: Params, text: Condition, empty: Condition, done: int, rng: np.random.Generator
) -> jax.Array:
    """Latents [B, h, w, C] after `done` guided steps from fresh noise. Their time is `sampler.tables.timesteps[done]`.

    text: B texts. empty: the negative text, one row or B rows.
    """
    batch = len(text.context)
    noise = rng.standard_normal((batch, *sampler.shape), np.float32)
    negative = empty if len(empty.context) == batch else empty.rows(np.zeros(batch, int))
    told = None if sampler.told is None else np.full(batch, sampler.told, np.float32)
    given = Guided(text.guided(told), negative, np.full(batch, sampler.guidance, np.float32))
    return partial_sample(sampler.denoiser, params, sampler.tables, noise, given, done, sampler.guidance > 1)
