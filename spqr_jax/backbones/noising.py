"""Noising processes of training. A process draws a time, mixes latents with noise, and forms the target."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spqr_jax.schedulers import ddpm


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
    """

    schedule: Callable[[Mapping[str, Any]], jax.Array]
    draw: Callable[..., Drawn]
    mix: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
    target: Callable[[str, jax.Array, Drawn], jax.Array]
    weight: Callable[[str, jax.Array, jax.Array, float], jax.Array]


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
