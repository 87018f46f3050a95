"""Latents on the way from noise to a picture, with the timestep they stand at: what STEREO and AdvUnlearn train on."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax import schedulers
from spqr_jax.generate import Conditioning
from spqr_jax.params import Definition, Params
from spqr_jax.pipeline import Pipeline
from spqr_jax.sampling.partial import partial_sample


class Sampler(NamedTuple):
    """Guided DDIM of `steps` steps, whose timesteps are `span` apart; latents are [B, *shape]."""

    definition: Definition
    tables: Any
    shape: tuple[int, int, int]
    steps: int
    span: int
    guidance: float


def sampler(pipeline: Pipeline, steps: int, guidance: float) -> Sampler:
    """Deterministic DDIM over the pipeline's schedule."""
    tables = schedulers.create("ddim", {**pipeline.configs["scheduler"], "clip_sample": False}, steps)
    unet = pipeline.configs["unet"]
    span = int(pipeline.configs["scheduler"].get("num_train_timesteps", 1000)) // steps
    side = unet["sample_size"]
    return Sampler(pipeline.definitions["unet"], tables, (side, side, unet["in_channels"]), steps, span, guidance)


def walk(
    sampler: Sampler, unet: Params, context: np.ndarray, empty: np.ndarray, done: int, rng: np.random.Generator
) -> jax.Array:
    """Latents [B, h, w, C] after `done` guided steps from fresh noise, under context [B, L, E] against empty [L, E].

    They stand at timestep `sampler.tables.timesteps[done]`.
    """
    batch = len(context)
    noise = rng.standard_normal((batch, *sampler.shape), np.float32)
    scale = jnp.full(batch, sampler.guidance, jnp.float32)
    condition = Conditioning(jnp.asarray(context), jnp.repeat(jnp.asarray(empty)[None], batch, axis=0), scale)
    return partial_sample(sampler.definition, unet, sampler.tables, noise, condition, done)
