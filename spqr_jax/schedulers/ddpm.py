"""The DDPM forward process (Ho et al. 2020), for training: noise schedules, noising, and the targets of models.

Tables are NumPy float32, equal to the bit on every machine. Those of diffusers' DDPMScheduler are the same within the
rounding of its float32, which differs between processors. The functions of latents are pure JAX, broadcast over the
batch axis, and compute and return float32 (diffusers follows the dtype of the latents).

Letters: B batch. Latents have any shape [B, ...], as [B, H, W, C]. t is int [B] in 0..T-1; JAX clamps other values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax.schedulers.common import float32, read_config


def betas(config: Mapping[str, Any]) -> np.ndarray:
    """Noise variances beta_t, float32 [T], of a scheduler_config.json dict.

    The schedule is linear, scaled_linear (Rombach et al. 2022), squaredcos_cap_v2 (Nichol & Dhariwal 2021) or sigmoid,
    or it is given as `trained_betas`. With rescale_betas_zero_snr, Algorithm 1 of Lin et al. 2023 (arXiv 2305.08891)
    follows. Raises ValueError for a field that is not supported.
    """
    return tables(read_config("ddpm", config))[0]


def alphas_cumprod(config: Mapping[str, Any]) -> np.ndarray:
    """Signal power abar_t = prod_{s<=t} (1 - beta_s), float32 [T], descending; exactly 0 at T-1 with zero-SNR."""
    return tables(read_config("ddpm", config))[1]


def tables(options: SimpleNamespace) -> tuple[np.ndarray, np.ndarray]:
    """As `betas` and `alphas_cumprod`, for fields that `read_config` has read.

    The schedule's betas, and 1 - beta, are float32 numbers, as in the training of published models. All that follows
    from them is computed in float64 and rounded once.
    """
    beta = _schedule(options)
    _check_betas(beta, options.num_train_timesteps)
    power = np.cumprod((1 - beta).astype(np.float64))
    if options.rescale_betas_zero_snr:
        power = _zero_terminal_snr(power)
        beta = 1 - np.append(power[:1], power[1:] / power[:-1])
    return beta.astype(np.float32), power.astype(np.float32)


def _schedule(options: SimpleNamespace) -> np.ndarray:
    """beta_t before any rescaling, float32 [T]."""
    count, start, end = options.num_train_timesteps, options.beta_start, options.beta_end
    if options.trained_betas is not None:
        return np.asarray(options.trained_betas, np.float32)
    if options.beta_schedule == "linear":
        return _torch_linspace(start, end, count)
    if options.beta_schedule == "scaled_linear":
        return _torch_linspace(start**0.5, end**0.5, count) ** 2
    if options.beta_schedule == "sigmoid":
        return (1 / (1 + np.exp(-np.linspace(-6, 6, count))) * (end - start) + start).astype(np.float32)
    return _cosine_betas(count)


def _torch_linspace(start: float, end: float, count: int) -> np.ndarray:
    """torch.linspace in float32: a float32 step counted from the nearer end, with one rounding a value."""
    first, last = np.float32(start), np.float32(end)
    step = np.float64((last - first) / np.float32(max(count - 1, 1)))
    index = np.arange(count)
    ahead = np.float64(first) + step * index
    behind = np.float64(last) - step * (count - 1 - index)
    return np.where(index < count // 2, ahead, behind).astype(np.float32)


def _cosine_betas(count: int, max_beta: float = 0.999) -> np.ndarray:
    def signal(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    pairs = ((i / count, (i + 1) / count) for i in range(count))
    return np.array([min(1 - signal(after) / signal(before), max_beta) for before, after in pairs], np.float32)


def _zero_terminal_snr(power: np.ndarray) -> np.ndarray:
    """Shift and scale sqrt(abar), float64 [T], so that its last value is 0 and its first stays; returns abar."""
    root = np.sqrt(power)
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2


def _check_betas(beta: np.ndarray, count: int) -> None:
    if beta.shape != (count,):
        raise ValueError(f"trained_betas has shape {beta.shape}; expected ({count},), one a training timestep")
    if not np.all((beta > 0) & (beta < 1)):
        raise ValueError(f"betas must lie in (0, 1), found {beta.min():g} to {beta.max():g}: see beta_start, beta_end")


def add_noise(alphas_cumprod: jax.Array, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise, float32 [B, ...] (DDPM eq. 4; DDPMScheduler.add_noise)."""
    x0, noise = float32(x0, noise)
    alpha, sigma = _alpha_sigma(alphas_cumprod, t, x0.ndim)
    return alpha * x0 + sigma * noise


def velocity(alphas_cumprod: jax.Array, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """v = sqrt(abar_t) noise - sqrt(1 - abar_t) x0, float32 [B, ...] (Salimans & Ho 2022; get_velocity)."""
    x0, noise = float32(x0, noise)
    alpha, sigma = _alpha_sigma(alphas_cumprod, t, x0.ndim)
    return alpha * noise - sigma * x0


def target(
    prediction_type: str, alphas_cumprod: jax.Array, *, x0: jax.Array, noise: jax.Array, t: jax.Array
) -> jax.Array:
    """The output at x_t that training wants of a model, float32 [B, ...]. Raises ValueError for an unknown type."""
    if prediction_type == "epsilon":
        return float32(noise)[0]
    if prediction_type == "v_prediction":
        return velocity(alphas_cumprod, x0, noise, t)
    if prediction_type == "sample":
        return float32(x0)[0]
    raise _unknown(prediction_type)


def pred_x0(
    prediction_type: str, alphas_cumprod: jax.Array, *, x_t: jax.Array, model_output: jax.Array, t: jax.Array
) -> jax.Array:
    """The clean latents that a model output implies at x_t, float32 [B, ...]. Raises ValueError for an unknown type.

    "epsilon" divides by sqrt(abar_t), so that the result is infinite at the last timestep of a zero-SNR schedule, as in
    diffusers.
    """
    x_t, model_output = float32(x_t, model_output)
    alpha, sigma = _alpha_sigma(alphas_cumprod, t, x_t.ndim)
    if prediction_type == "epsilon":
        return (x_t - sigma * model_output) / alpha
    if prediction_type == "v_prediction":
        return alpha * x_t - sigma * model_output
    if prediction_type == "sample":
        return model_output
    raise _unknown(prediction_type)


def snr(alphas_cumprod: jax.Array, t: jax.Array) -> jax.Array:
    """Signal-to-noise ratio abar_t / (1 - abar_t), float32 of t's shape (as in Min-SNR weighting, arXiv 2303.09556)."""
    power = float32(alphas_cumprod)[0][t]
    return power / (1 - power)


def _alpha_sigma(alphas_cumprod: jax.Array, t: jax.Array, ndim: int) -> tuple[jax.Array, jax.Array]:
    """sqrt(abar_t) and sqrt(1 - abar_t), each [B, 1, ...] (or scalar for scalar t), to broadcast over latents."""
    power = float32(alphas_cumprod)[0][t]
    if power.ndim:
        power = power.reshape(power.shape + (1,) * (ndim - power.ndim))
    return jnp.sqrt(power), jnp.sqrt(1 - power)


def _unknown(prediction_type: str) -> ValueError:
    return ValueError(f"prediction_type={prediction_type!r}; expected 'epsilon', 'v_prediction' or 'sample'")
