"""Euler's method on the probability-flow ODE (Karras et al. 2022, arXiv 2206.00364, Algorithm 2 without churn).

Equal to diffusers' EulerDiscreteScheduler with interpolation_type "linear" and discrete timesteps. Latents are kept in
the variance-exploding form x0 + sigma * eps, so they start at `init_noise_sigma` and the model's input is scaled down.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from spqr_jax.schedulers import ddpm
from spqr_jax.schedulers.common import as_timesteps, at, check_steps, float32, prediction, read_config, spaced_timesteps

_DEFAULTS = {
    "timestep_spacing": "linspace",
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    "final_sigmas_type": "zero",
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
_CHOICES = {
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "final_sigmas_type": ("zero", "sigma_min"),
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
}


class Euler(NamedTuple):
    """Tables for one sample of E = n evaluations; float32 [E] unless noted."""

    timesteps: np.ndarray  # [E], descending; int32, or float32 where linspace gives fractions
    init_noise_sigma: float
    scale: np.ndarray  # model input = scale * latents, 1 / sqrt(sigma^2 + 1)
    x0_x: np.ndarray  # predicted x0 = x0_x * x + x0_m * model_output
    x0_m: np.ndarray
    sigma: np.ndarray  # noise level of the latents
    stride: np.ndarray  # sigma_next - sigma, negative

    def init_state(self, latents: jax.Array) -> tuple[()]:
        """An empty state: no value is carried from step to step."""
        del latents
        return ()

    def scale_input(self, latents: jax.Array, i: jax.Array | int) -> jax.Array:
        """The input of the model: latents scaled to unit variance, float32."""
        return float32(latents)[0] * at(self.scale, i)

    def step(
        self, state: tuple[()], model_output: jax.Array, i: jax.Array | int, latents: jax.Array
    ) -> tuple[jax.Array, tuple[()]]:
        """Latents after evaluation i, float32 of the latents' shape, and the (empty) state."""
        model_output, latents = float32(model_output, latents)
        x0 = at(self.x0_x, i) * latents + at(self.x0_m, i) * model_output
        slope = (latents - x0) / at(self.sigma, i)
        return latents + slope * at(self.stride, i), state


def create(config: Mapping[str, Any], num_steps: int) -> Euler:
    """Tables for `num_steps` steps of a scheduler_config.json dict.

    Raises ValueError for a field that is not supported.
    """
    options = read_config("euler", config, defaults=_DEFAULTS, choices=_CHOICES)
    check_steps("euler", num_steps, options.num_train_timesteps)
    power = ddpm.tables(options)[1]
    if options.rescale_betas_zero_snr:
        power[-1] = 2**-24  # as diffusers: the smallest float16, so that the first sigma is finite
    all_sigmas = np.sqrt((1 - power) / power)
    timesteps = as_timesteps("euler", spaced_timesteps(options, num_steps), options.num_train_timesteps)
    inner = np.interp(timesteps, np.arange(len(all_sigmas)), all_sigmas)
    last = all_sigmas[0] if options.final_sigmas_type == "sigma_min" else 0.0
    sigmas = np.append(inner, last).astype(np.float32)

    scale = 1 / np.sqrt(sigmas[:-1] ** 2 + 1)
    reading = prediction("euler", options.prediction_type, scale, sigmas[:-1] * scale)
    largest = float(sigmas.max())
    # A spacing that does not start at T - 1 leaves signal in the first latents: their variance is sigma^2 + 1.
    start = largest if options.timestep_spacing != "leading" else float(np.sqrt(np.float32(largest) ** 2 + 1))
    # `prediction` reads unit-variance latents, and these are 1 / scale times larger.
    return Euler(timesteps, start, scale, reading.x0_x * scale, reading.x0_m, sigmas[:-1], np.diff(sigmas))
