"""DPM-Solver++ 2M (Lu et al. 2022, arXiv 2211.01095): deterministic multistep sampling in data prediction.

Equal to diffusers' DPMSolverMultistepScheduler with algorithm_type="dpmsolver++" and solver_order 1 or 2. Each step is
x' = keep * x + first * m + second * (m - m_previous), where m is the predicted x0. The coefficients are tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax.schedulers import ddpm
from spqr_jax.schedulers.common import as_timesteps, at, check_steps, float32, prediction, read_config, spaced_timesteps

_DEFAULTS = {
    "timestep_spacing": "linspace",
    "solver_order": 2,
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "lower_order_final": True,
    "euler_at_final": False,
    "final_sigmas_type": "zero",
    "lambda_min_clipped": -float("inf"),
    "variance_type": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
}
_CHOICES = {
    "solver_order": (1, 2),
    # diffusers takes the option names of its DEIS and UniPC schedulers for the defaults of this solver.
    "algorithm_type": ("dpmsolver++", "deis"),
    "solver_type": ("midpoint", "heun", "logrho", "bh1", "bh2"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "use_lu_lambdas": (False, None),
    "use_flow_sigmas": (False, None),
}


class DPMPP(NamedTuple):
    """Tables for one sample of E = n evaluations; float32 [E] unless noted."""

    timesteps: np.ndarray  # int32 [E], descending
    init_noise_sigma: float
    x0_x: np.ndarray  # predicted x0 = x0_x * x + x0_m * model_output
    x0_m: np.ndarray
    keep: np.ndarray  # weight of the latents, sigma_next / sigma
    first: np.ndarray  # weight of m
    second: np.ndarray  # weight of m - m_previous; 0 where the step is first order

    def init_state(self, latents: jax.Array) -> jax.Array:
        """The predicted x0 of the previous step. Before the first step: float32 zeros of the latents' shape."""
        return jnp.zeros(latents.shape, jnp.float32)

    def scale_input(self, latents: jax.Array, i: jax.Array | int) -> jax.Array:
        """The input of the model: the latents themselves, in float32."""
        del i
        return float32(latents)[0]

    def step(
        self, state: jax.Array, model_output: jax.Array, i: jax.Array | int, latents: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Latents after evaluation i, and the new state; all float32 of the latents' shape."""
        model_output, latents = float32(model_output, latents)
        x0 = at(self.x0_x, i) * latents + at(self.x0_m, i) * model_output
        moved = at(self.keep, i) * latents + at(self.first, i) * x0 + at(self.second, i) * (x0 - state)
        return moved, x0


def create(config: Mapping[str, Any], num_steps: int) -> DPMPP:
    """Tables for `num_steps` steps of a scheduler_config.json dict.

    Raises ValueError for a field that is not supported.
    """
    options = read_config("dpmpp", config, defaults=_DEFAULTS, choices=_CHOICES)
    check_steps("dpmpp", num_steps, options.num_train_timesteps)
    power = ddpm.tables(options)[1]
    if options.rescale_betas_zero_snr:
        power[-1] = 2**-24  # as diffusers: the smallest float16, so that the first sigma is finite
    all_sigmas = np.sqrt((1 - power) / power)
    timesteps = as_timesteps("dpmpp", _timesteps(options, power, num_steps), options.num_train_timesteps)
    if np.any(np.diff(timesteps) >= 0):
        raise ValueError(f"scheduler dpmpp: num_steps={num_steps} repeats a timestep; use fewer steps")
    last = all_sigmas[0] if options.final_sigmas_type == "sigma_min" else 0.0
    inner = np.interp(timesteps, np.arange(len(all_sigmas)), all_sigmas)
    sigmas = np.append(inner, last).astype(np.float32)

    alpha = 1 / np.sqrt(sigmas**2 + 1)
    sigma = sigmas * alpha
    reading = prediction("dpmpp", options.prediction_type, alpha[:-1], sigma[:-1])
    keep, first, second = _coefficients(options, alpha, sigma)
    return DPMPP(timesteps, 1.0, reading.x0_x, reading.x0_m, keep, first, second)


def _timesteps(options: SimpleNamespace, power: np.ndarray, num_steps: int) -> np.ndarray:
    """One more point than steps is laid out and the last, at or near 0, is dropped; log-SNR is clipped from below."""
    signal = power.astype(np.float64)
    log_snr = (np.log(signal / (1 - signal)) / 2)[::-1]
    total = options.num_train_timesteps
    usable = total - int(np.searchsorted(log_snr, options.lambda_min_clipped))
    if options.timestep_spacing == "trailing":
        return np.round(np.arange(usable, 0, -total / num_steps)) - 1
    clipped = SimpleNamespace(**(vars(options) | {"num_train_timesteps": usable}))
    return np.round(spaced_timesteps(clipped, num_steps + 1)[:-1])


def _coefficients(
    options: SimpleNamespace, alpha: np.ndarray, sigma: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """keep, first, second, each float32 [E], from float32 alpha and sigma [E + 1] (Algorithm 2, or its Heun variant).

    In float64, rounded once: float32 logarithms differ between processors, and differences of them magnify that.
    """
    steps, keep = len(alpha) - 1, sigma[1:] / sigma[:-1]
    alpha, sigma = alpha.astype(np.float64), sigma.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):  # the last sigma may be 0: infinite lambda, first-order step
        lam = np.log(alpha) - np.log(sigma)
        h = np.diff(lam)
        shrink = np.expm1(-h)
        ratio = np.append(1, h[:-1] / h[1:])
        slope = alpha[1:] * (shrink / h + 1) if options.solver_type == "heun" else -0.5 * (alpha[1:] * shrink)
        second = slope * (1 / ratio)
    order_two = np.full(steps, options.solver_order == 2)
    order_two[0] = False
    if options.euler_at_final or options.final_sigmas_type == "zero" or (options.lower_order_final and steps < 15):
        order_two[-1] = False
    first = -(alpha[1:] * shrink)
    return keep, first.astype(np.float32), np.where(order_two, second, 0).astype(np.float32)
