"""Euler's method on the ODE of flow matching (Esser et al. 2024, arXiv 2403.03206): one evaluation a step.

Equal to diffusers' FlowMatchEulerDiscreteScheduler without stochastic sampling, with static or dynamic shifting.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from spqr_jax.schedulers import flow
from spqr_jax.schedulers.common import at, check_steps, float32
from spqr_jax.schedulers.flow import SPACED, Spacing


class FlowEuler(NamedTuple):
    """Tables for one sample of E = n evaluations; float32 [E] unless noted."""

    timesteps: np.ndarray  # noise level times T, descending, fractional
    init_noise_sigma: float
    stride: np.ndarray  # sigma_next - sigma, negative

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
        """Latents after evaluation i, float32 of the latents' shape, and the (empty) state."""
        model_output, latents = float32(model_output, latents)
        return latents + at(self.stride, i) * model_output, state


def create(config: Mapping[str, Any], num_steps: int, spacing: Spacing = SPACED) -> FlowEuler:
    """Tables for `num_steps` steps of a scheduler_config.json dict.

    Raises ValueError for a field that is not supported, and for dynamic shifting without a number of tokens.
    """
    options = flow.read(config)
    check_steps(flow.NAME, num_steps, options.num_train_timesteps)
    sigmas = flow.sampling_sigmas(options, num_steps, spacing)
    timesteps = sigmas * np.float32(options.num_train_timesteps)
    return FlowEuler(timesteps, 1.0, np.diff(np.append(sigmas, np.float32(0))))
