"""DDIM (Song et al. 2021, arXiv 2010.02502) with eta = 0: deterministic, one evaluation a step.

Equal to diffusers' DDIMScheduler.step with its defaults: no stochastic noise, and the clipped x0 does not change eps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax.schedulers import ddpm
from spqr_jax.schedulers.common import as_timesteps, at, check_steps, float32, prediction, read_config, spaced_timesteps

_DEFAULTS = {"set_alpha_to_one": True, "clip_sample": True, "clip_sample_range": 1.0}


class DDIM(NamedTuple):
    """Tables for one sample of E = n evaluations; float32 [E] unless noted."""

    timesteps: np.ndarray  # int32 [E], descending
    init_noise_sigma: float
    x0_x: np.ndarray  # predicted x0 = x0_x * x + x0_m * model_output
    x0_m: np.ndarray
    eps_x: np.ndarray  # predicted noise = eps_x * x + eps_m * model_output
    eps_m: np.ndarray
    next_alpha: np.ndarray  # sqrt(abar) of the next, less noisy point
    next_sigma: np.ndarray  # sqrt(1 - abar) there
    clip: float  # bound on the predicted x0, infinite without clip_sample

    def init_state(self, latents: jax.Array) -> tuple[()]:
        """An empty state: no value is carried from step to step."""
        del latents
        return ()

    def scale_input(self, latents: jax.Array, i: jax.Array | int) -> jax.Array:
        """The input of the model: the latents themselves, in float32."""
        del i
        return float32(latents)[0]

    def step(
        self, state: tuple[()], model_output: jax.Array, i: jax.Array | int, latents: jax.Array
    ) -> tuple[jax.Array, tuple[()]]:
        """Latents after evaluation i, float32 of the latents' shape, and the (empty) state: eq. 12 with sigma_t = 0."""
        model_output, latents = float32(model_output, latents)
        x0 = at(self.x0_x, i) * latents + at(self.x0_m, i) * model_output
        noise = at(self.eps_x, i) * latents + at(self.eps_m, i) * model_output
        x0 = jnp.clip(x0, -self.clip, self.clip)
        return at(self.next_alpha, i) * x0 + at(self.next_sigma, i) * noise, state


def create(config: Mapping[str, Any], num_steps: int) -> DDIM:
    """Tables for `num_steps` steps of a scheduler_config.json dict.

    Raises ValueError for a field that is not supported.
    """
    options = read_config("ddim", config, defaults=_DEFAULTS)
    total = options.num_train_timesteps
    check_steps("ddim", num_steps, total)
    power = ddpm.tables(options)[1]
    timesteps = as_timesteps("ddim", np.round(spaced_timesteps(options, num_steps)), total)
    # As diffusers: the next point is T // n below, for every spacing; below 0 it is clean (or as clean as t = 0).
    following = timesteps - total // num_steps
    final = np.float32(1) if options.set_alpha_to_one else power[0]
    next_power = np.where(following >= 0, power[np.maximum(following, 0)], final)

    here = power[timesteps]
    reading = prediction("ddim", options.prediction_type, np.sqrt(here), np.sqrt(1 - here))
    clip = options.clip_sample_range if options.clip_sample else float("inf")
    return DDIM(timesteps, 1.0, *reading, np.sqrt(next_power), np.sqrt(1 - next_power), float(clip))
