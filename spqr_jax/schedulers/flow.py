"""Flow matching (Lipman et al. 2023; Esser et al. 2024, arXiv 2403.03206): noise levels, noising, and the target.

The noise level sigma runs from 1, pure noise, to 0, and latents are x_sigma = (1 - sigma) x_0 + sigma noise. A model
predicts the velocity, noise - x_0. Its time is sigma times T, a fraction. Tables are NumPy, with the operations and the
dtypes of diffusers' FlowMatchEulerDiscreteScheduler, and so equal to its tables to the bit.

Letters: B batch, T training timesteps (1000), n steps. Latents have any shape [B, ...].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax.schedulers.common import float32, read_fields

NAME = "flow_euler"
CLASS = "FlowMatchEulerDiscreteScheduler"

_FIELDS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "time_shift_type": "exponential",
    "shift_terminal": None,
    "invert_sigmas": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "stochastic_sampling": False,
}
_CHOICES: dict[str, tuple[Any, ...]] = {
    "time_shift_type": ("exponential", "linear"),
    "shift_terminal": (None,),
    **dict.fromkeys(
        ("invert_sigmas", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "stochastic_sampling"),
        (False, None),
    ),
}


class Spacing(NamedTuple):
    """What a pipeline adds to its scheduler's config; hashable.

    Attributes:
        tokens: image tokens that the denoiser reads. Under dynamic shifting the shift grows with their number.
        by_steps: before the shift, levels run from 1 down to 1/n, as FLUX's pipeline lays them out. Otherwise they run
            down to the lowest level of training, as SD3's does.
    """

    tokens: int | None = None
    by_steps: bool = False


SPACED = Spacing()


def read(config: Mapping[str, Any]) -> SimpleNamespace:
    """The fields of a scheduler_config.json dict. Raises ValueError for another family, and for what is not here."""
    family = config.get("_class_name")
    if family is not None and family != CLASS:
        raise ValueError(
            f"scheduler {NAME}: _class_name={family!r} is not of flow matching; expected {CLASS}. Choose a scheduler "
            "of denoising diffusion for this model"
        )
    return read_fields(NAME, config, _FIELDS, _CHOICES)


def training_sigmas(config: Mapping[str, Any]) -> np.ndarray:
    """The noise levels of training, float32 [T], descending from 1, under the static shift if that is not dynamic."""
    return _training_sigmas(read(config))


def _training_sigmas(options: SimpleNamespace) -> np.ndarray:
    count = options.num_train_timesteps
    sigmas = np.linspace(1, count, count, dtype=np.float32)[::-1] / np.float32(count)
    return sigmas if options.use_dynamic_shifting else static_shift(sigmas, options.shift)


def sampling_sigmas(options: SimpleNamespace, num_steps: int, spacing: Spacing) -> np.ndarray:
    """The noise levels of n steps, float32 [n], descending from 1, without the last 0."""
    if spacing.by_steps:
        sigmas = np.linspace(1.0, 1 / num_steps, num_steps).astype(np.float32)
    else:
        total, trained = options.num_train_timesteps, _training_sigmas(options)
        sigmas = np.linspace(float(trained[0]) * total, float(trained[-1]) * total, num_steps) / total
    if not options.use_dynamic_shifting:
        return static_shift(sigmas, options.shift).astype(np.float32)
    return dynamic_shift(sigmas, mu(options, spacing), options.time_shift_type).astype(np.float32)


def static_shift(sigmas: np.ndarray, shift: float) -> np.ndarray:
    """shift s / (1 + (shift - 1) s): more steps at high noise (arXiv 2403.03206, eq. 23), in the dtype of `sigmas`."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def dynamic_shift(sigmas: np.ndarray, mu: float, kind: str) -> np.ndarray:
    """a / (a + 1/s - 1), a = exp(mu) for the kind "exponential", mu for "linear"; in the dtype of `sigmas`."""
    amount = math.exp(mu) if kind == "exponential" else mu
    return amount / (amount + (1 / sigmas - 1))


def mu(options: SimpleNamespace, spacing: Spacing) -> float:
    """The shift that an image of so many tokens gets: linear in them, from `base_shift` to `max_shift`."""
    if spacing.tokens is None:
        raise ValueError(
            f"scheduler {NAME}: use_dynamic_shifting=True needs the number of image tokens; pass "
            "a Spacing with `tokens`"
        )
    slope = (options.max_shift - options.base_shift) / (options.max_image_seq_len - options.base_image_seq_len)
    return spacing.tokens * slope + (options.base_shift - slope * options.base_image_seq_len)


def add_noise(sigmas: jax.Array, x0: jax.Array, noise: jax.Array) -> jax.Array:
    """(1 - sigma) x_0 + sigma noise, float32 [B, ...]. sigmas: [B]."""
    sigmas, x0, noise = float32(sigmas, x0, noise)
    sigmas = sigmas.reshape(sigmas.shape + (1,) * (x0.ndim - 1))
    return (1 - sigmas) * x0 + sigmas * noise


def velocity(x0: jax.Array, noise: jax.Array) -> jax.Array:
    """noise - x_0, the output that training wants of a model, float32 [B, ...]."""
    x0, noise = float32(x0, noise)
    return noise - x0


def density(kind: str, normal: jax.Array, uniform: jax.Array, *, mean: float = 0.0, std: float = 1.0) -> jax.Array:
    """Places u in 0..1 of training times, float32 [B], of the weighting scheme `kind`; diffusers' function of that aim.

    "logit_normal": the sigmoid of mean + std * normal (arXiv 2403.03206, eq. 19); "none": `uniform`. normal, uniform:
    [B] random values. Raises ValueError for another kind.
    """
    if kind == "logit_normal":
        return jax.nn.sigmoid(mean + std * normal)
    if kind == "none":
        return uniform
    raise ValueError(f"weighting scheme {kind!r} is unknown; expected 'logit_normal' or 'none'")


def at_density(schedule: jax.Array, u: jax.Array) -> jax.Array:
    """The noise levels at places u, float32 [B]. schedule: `training_sigmas`. u in 0..1, and 1 is the last level."""
    count = len(schedule)
    return jnp.asarray(schedule, jnp.float32)[jnp.minimum((u * count).astype(jnp.int32), count - 1)]
