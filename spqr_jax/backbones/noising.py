"""Noising processes of training. A process draws a time, mixes latents with noise, and forms the target."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spqr_jax.schedulers import ddpm, flow


class Drawn(NamedTuple):
    """The random values of a training step: latents and noise [B, h, w, C], times [B]."""

    latents: jax.Array
    noise: jax.Array
    times: jax.Array


class Noising(NamedTuple):
    """A noising process; hashable, static under `jax.jit`.

    Attributes:
        schedule: scheduler config (a diffusers dict) -> the `schedule` argument of the functions below.
        draw: (key, mean, std, schedule, noise_offset) -> Drawn, latents ~ N(mean, std^2).
        mix: (schedule, latents, noise, times) -> noised latents.
        target: (prediction, schedule, Drawn) -> the right output of a model with this kind of prediction.
        weight: (prediction, schedule, times, gamma) -> weights [B] of min-SNR (Hang et al., 2023).
        prediction: the kind of prediction of all models that were trained so; None: the scheduler's config names it.
    """

    schedule: Callable[[Mapping[str, Any]], jax.Array]
    draw: Callable[..., Drawn]
    mix: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
    target: Callable[[str, jax.Array, Drawn], jax.Array]
    weight: Callable[[str, jax.Array, jax.Array, float], jax.Array]
    prediction: str | None = None


def _ddpm_schedule(config: Mapping[str, Any]) -> jax.Array:
    """abar_t, float32 [T]."""
    return jnp.asarray(ddpm.alphas_cumprod(config))


def _ddpm_draw(key: jax.Array, mean: Any, std: Any, schedule: jax.Array, noise_offset: float = 0.0) -> Drawn:
    """Times int32 [B] uniform in 0..T-1. `noise_offset` adds that much noise common to the pixels of a channel."""
    keys = jax.random.split(key, 4)
    latents = mean + std * jax.random.normal(keys[0], mean.shape)
    noise = jax.random.normal(keys[1], mean.shape)
    if noise_offset:
        noise += noise_offset * jax.random.normal(keys[3], (mean.shape[0], 1, 1, mean.shape[-1]))
    return Drawn(latents, noise, jax.random.randint(keys[2], mean.shape[:1], 0, len(schedule)))


def _ddpm_target(prediction: str, schedule: jax.Array, drawn: Drawn) -> jax.Array:
    return ddpm.target(prediction, schedule, x0=drawn.latents, noise=drawn.noise, t=drawn.times)


def _ddpm_weight(prediction: str, schedule: jax.Array, times: jax.Array, gamma: float) -> jax.Array:
    snr = ddpm.snr(schedule, times)
    return jnp.minimum(snr, gamma) / (snr + 1 if prediction == "v_prediction" else snr)


# Denoising diffusion (Ho et al., 2020): whole timesteps, x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise.
DDPM = Noising(_ddpm_schedule, _ddpm_draw, ddpm.add_noise, _ddpm_target, _ddpm_weight)


def _flow_schedule(config: Mapping[str, Any]) -> jax.Array:
    """Noise levels sigma, float32 [T], descending from 1."""
    return jnp.asarray(flow.training_sigmas(config))


def _flow_draw(
    key: jax.Array, mean: Any, std: Any, schedule: jax.Array, noise_offset: float = 0.0, *, density: str
) -> Drawn:
    """Times float32 [B], noise levels of the schedule times T. `noise_offset` as in denoising diffusion."""
    keys = jax.random.split(key, 4)
    latents = mean + std * jax.random.normal(keys[0], mean.shape)
    noise = jax.random.normal(keys[1], mean.shape)
    if noise_offset:
        noise += noise_offset * jax.random.normal(keys[3], (mean.shape[0], 1, 1, mean.shape[-1]))
    count = mean.shape[:1]
    u = flow.density(density, jax.random.normal(keys[2], count), jax.random.uniform(keys[2], count))
    return Drawn(latents, noise, flow.at_density(schedule, u) * len(schedule))


def _flow_mix(schedule: jax.Array, latents: jax.Array, noise: jax.Array, times: jax.Array) -> jax.Array:
    return flow.add_noise(times / len(schedule), latents, noise)


def _flow_target(prediction: str, schedule: jax.Array, drawn: Drawn) -> jax.Array:
    return flow.velocity(drawn.latents, drawn.noise)


def _flow_weight(prediction: str, schedule: jax.Array, times: jax.Array, gamma: float) -> jax.Array:
    """min(SNR, gamma) of the error of x_0, as for other predictions: that error is sigma times the velocity's."""
    sigma = times / len(schedule)
    return jnp.minimum(jnp.square(1 - sigma), gamma * jnp.square(sigma))


def _flow(density: str) -> Noising:
    """Flow matching with times of this density (`flow.density`)."""
    draw = functools.partial(_flow_draw, density=density)
    return Noising(_flow_schedule, draw, _flow_mix, _flow_target, _flow_weight, prediction="flow")


# Flow matching (arXiv 2403.03206): times are fractions, x_t = (1 - sigma) x_0 + sigma noise, the target is noise - x_0,
# and every time has the same weight. Levels are under the static shift of the scheduler's config, as in diffusers'
# train_dreambooth_sd3.py (with --precondition_outputs 0, its plain target) and train_dreambooth_flux.py by default.
SD3_FLOW = _flow("logit_normal")
FLUX_FLOW = _flow("none")
