"""PNDM (Liu et al. 2022, arXiv 2202.09778): linear multistep over past outputs (PLMS), the sampler of SD 1.x.

Equal to diffusers' PNDMScheduler. With skip_prk_steps, as in every Stable Diffusion config, the first step is taken
twice, the second time with an average of outputs, so E = n + 1. Without it three Runge-Kutta steps of 4 evaluations
come first, so E = n + 9. Both are one recurrence, with weights in a table per evaluation. It forms an estimate e from
the new output, three remembered outputs and a Runge-Kutta sum. Then follows the transfer of eq. 9, from the current
sample or a held one.
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

_DEFAULTS = {"skip_prk_steps": False, "set_alpha_to_one": False}
_CHOICES = {"prediction_type": ("epsilon", "v_prediction"), "rescale_betas_zero_snr": (False,)}

# Adams-Bashforth weights of (newest, ...) outputs by how many are known.
_MULTISTEP = np.array(
    [[1, 0, 0, 0], [3 / 2, -1 / 2, 0, 0], [23 / 12, -16 / 12, 5 / 12, 0], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]
)
_RUNGE_KUTTA = (1 / 6, 1 / 3, 1 / 3, 1 / 6)


class State(NamedTuple):
    """The values that PNDM carries from one evaluation to the next; float32."""

    history: tuple[jax.Array, jax.Array, jax.Array]  # past model outputs, newest first
    total: jax.Array  # Runge-Kutta sum of this step's outputs
    held: jax.Array  # the sample that the repeated or Runge-Kutta evaluations start from


class PNDM(NamedTuple):
    """Tables for one sample of E evaluations; float32 [E] unless noted."""

    timesteps: np.ndarray  # int32 [E]
    init_noise_sigma: float
    newest: np.ndarray  # e = newest * model_output + past . history + total_in * total
    past: np.ndarray  # [E, 3]
    total_in: np.ndarray
    total_keep: np.ndarray  # total' = total_keep * total + total_add * model_output
    total_add: np.ndarray
    remember: np.ndarray  # bool [E]: the output enters the history
    restart: np.ndarray  # bool [E]: this evaluation starts from the held sample, else from (and holds) the current one
    eps_x: np.ndarray  # noise = eps_x * sample + eps_m * e
    eps_m: np.ndarray
    keep: np.ndarray  # next sample = keep * sample - move * noise
    move: np.ndarray

    def init_state(self, latents: jax.Array) -> State:
        """The state before any output: float32 zeros of the latents' shape."""
        zero = jnp.zeros(latents.shape, jnp.float32)
        return State((zero, zero, zero), zero, zero)

    def scale_input(self, latents: jax.Array, i: jax.Array | int) -> jax.Array:
        """The input of the model: the latents themselves, in float32."""
        del i
        return float32(latents)[0]

    def step(
        self, state: State, model_output: jax.Array, i: jax.Array | int, latents: jax.Array
    ) -> tuple[jax.Array, State]:
        """Latents after evaluation i, float32 of the latents' shape, and the new state."""
        output, latents = float32(model_output, latents)
        past = at(self.past, i)
        # Written out, not a matrix product: accelerators would round that to bfloat16 or TF32.
        estimate = at(self.newest, i) * output + at(self.total_in, i) * state.total
        estimate += sum(past[k] * state.history[k] for k in range(3))
        sample = jnp.where(at(self.restart, i), state.held, latents)
        noise = at(self.eps_x, i) * sample + at(self.eps_m, i) * estimate
        moved = at(self.keep, i) * sample - at(self.move, i) * noise

        shifted = (output, *state.history[:2])
        history = jax.tree.map(lambda new, old: jnp.where(at(self.remember, i), new, old), shifted, state.history)
        total = at(self.total_keep, i) * state.total + at(self.total_add, i) * output
        return moved, State(history, total, sample)


def create(config: Mapping[str, Any], num_steps: int) -> PNDM:
    """Tables for `num_steps` steps of a scheduler_config.json dict.

    Raises ValueError for a field that is not supported. rescale_betas_zero_snr is one, since eq. 9 divides by the
    signal; diffusers ignores it, and samples a model that was trained at zero SNR with the wrong betas.
    """
    options = read_config("pndm", config, defaults=_DEFAULTS, choices=_CHOICES)
    check_steps("pndm", num_steps, options.num_train_timesteps)
    spaced = np.round(spaced_timesteps(options, num_steps))
    stride = options.num_train_timesteps // num_steps
    if options.skip_prk_steps:
        timesteps, weights = np.concatenate([spaced[:2], spaced[1:]]), _multistep_weights(num_steps)
        source, goal = timesteps.copy(), timesteps - stride
        source[1:2], goal[1:2] = timesteps[1:2] + stride, timesteps[1:2]  # the repeated step, to the same goal
    else:
        timesteps, source, goal = _runge_kutta_points(spaced, stride)
        weights = _runge_kutta_weights(num_steps)
    checked = as_timesteps("pndm", timesteps, options.num_train_timesteps)
    return PNDM(checked, 1.0, *weights, *_transfer(options, source.astype(np.int64), goal.astype(np.int64)))


class _Weights(NamedTuple):
    newest: np.ndarray
    past: np.ndarray
    total_in: np.ndarray
    total_keep: np.ndarray
    total_add: np.ndarray
    remember: np.ndarray
    restart: np.ndarray


def _multistep_weights(num_steps: int) -> _Weights:
    """PLMS from the start: outputs known are 1, (1, averaged with the new one), 2, 3, 4, 4, ..."""
    evaluations = num_steps + (num_steps > 1)
    known = np.clip(np.arange(evaluations) - 1, 0, 3)
    weights = _MULTISTEP[known]
    weights[1:2] = [1 / 2, 1 / 2, 0, 0]
    repeated = np.arange(evaluations) == 1
    zero = np.zeros(evaluations, np.float32)
    weights = weights.astype(np.float32)
    return _Weights(weights[:, 0], weights[:, 1:], zero, zero, zero, ~repeated, repeated)


def _runge_kutta_weights(num_steps: int) -> _Weights:
    """12 Runge-Kutta evaluations (stages 0..3, three times), then PLMS with four outputs known."""
    stage = np.concatenate([np.tile(np.arange(4), 3), np.full(num_steps - 3, -1)])
    weights = np.where(stage[:, None] < 0, _MULTISTEP[3], [1, 0, 0, 0]).astype(np.float32)
    weights[stage == 3, 0] = _RUNGE_KUTTA[3]
    adding = (stage >= 0) & (stage < 3)
    added = np.where(adding, np.take(_RUNGE_KUTTA, np.maximum(stage, 0)), 0).astype(np.float32)
    last = (stage == 3).astype(np.float32)
    return _Weights(weights[:, 0], weights[:, 1:], last, adding.astype(np.float32), added, stage <= 0, stage > 0)


def _runge_kutta_points(spaced: np.ndarray, stride: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Model timesteps, and the source and goal of each evaluation's transfer, float64 [n + 9]."""
    if len(spaced) < 4:
        raise ValueError(f"scheduler pndm: num_steps={len(spaced)} must be at least 4 with skip_prk_steps=False")
    half = stride // 2
    # Per Runge-Kutta step: at t, half a stride below (twice), and at the next t.
    middle = spaced[1:4] + half
    stages = np.stack([spaced[:3], middle, middle, spaced[1:4]], axis=1).reshape(-1)
    timesteps = np.concatenate([stages, spaced[3:]])
    source = np.concatenate([np.repeat(spaced[:3], 4), spaced[3:]])
    shift = np.where(np.arange(12) % 2 == 0, half, 0)
    goal = np.concatenate([stages - shift, spaced[3:] - stride])
    return timesteps, source, goal


def _transfer(
    options: SimpleNamespace, source: np.ndarray, goal: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """eps_x, eps_m, keep, move, float32 [E]: eq. 9 from timestep `source` to `goal`, below 0 meaning clean."""
    power = ddpm.tables(options)[1]
    final = np.float32(1) if options.set_alpha_to_one else power[0]
    here, there = power[source], np.where(goal >= 0, power[np.maximum(goal, 0)], final)
    reading = prediction("pndm", options.prediction_type, np.sqrt(here), np.sqrt(1 - here))
    spread = here * np.sqrt(1 - there) + np.sqrt(here * (1 - here) * there)
    return reading.eps_x, reading.eps_m, np.sqrt(there / here), (there - here) / spread
