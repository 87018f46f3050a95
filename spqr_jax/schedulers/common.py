"""Functions that all schedulers share: reading a scheduler_config.json, spacing timesteps, reading predictions.

Letters: T training timesteps, n requested steps, E evaluations of the model in one sample (E = n except for PNDM).
Tables are NumPy float32, equal to the bit on every machine: float32 operations are only those that IEEE 754 rounds
correctly (+, -, *, /, square root); logarithms, exponentials and products over all timesteps are float64, rounded once.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# A config written for any of these describes the same family (variance preserving, discrete betas), so a user may
# sample it with another scheduler of ours. Anything else (flow matching, EDM, consistency) would be sampled wrongly.
_FAMILY = frozenset(
    {
        "DDIMScheduler",
        "DDPMScheduler",
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSDEScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LMSDiscreteScheduler",
        "PNDMScheduler",
        "UniPCMultistepScheduler",
    }
)

_DEFAULTS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "rescale_betas_zero_snr": False,
    "thresholding": False,
}

_CHOICES: dict[str, tuple[Any, ...]] = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": ("leading", "linspace", "trailing"),
    "thresholding": (False,),
}


def read_config(
    name: str,
    config: Mapping[str, Any],
    *,
    defaults: Mapping[str, Any] | None = None,
    choices: Mapping[str, tuple[Any, ...]] | None = None,
) -> SimpleNamespace:
    """The fields of `config` that scheduler `name` reads. Absent ones have the defaults of its diffusers class.

    defaults, choices: defaults and allowed values that replace the shared ones, or come beside them. Fields that no
    scheduler here reads are ignored, as in diffusers. Raises ValueError naming a field of the wrong type, and a field
    with a value that is not implemented here; no value is replaced silently.
    """
    family = config.get("_class_name")
    if family is not None and family not in _FAMILY:
        raise ValueError(
            f"scheduler {name}: _class_name={family!r} is not of the discrete-beta diffusion family; "
            f"expected one of {', '.join(sorted(_FAMILY))}"
        )
    return read_fields(name, config, _DEFAULTS | dict(defaults or {}), _CHOICES | dict(choices or {}))


def read_fields(
    name: str, config: Mapping[str, Any], fields: Mapping[str, Any], allowed: Mapping[str, tuple[Any, ...]]
) -> SimpleNamespace:
    """The named fields of `config`, or their defaults. Raises ValueError as `read_config`."""
    values = {field: config.get(field, default) for field, default in fields.items()}
    for field, value in values.items():
        if field in allowed:
            if value not in allowed[field]:
                options = ", ".join(repr(option) for option in allowed[field])
                raise ValueError(f"scheduler {name}: {field}={value!r} is not supported; expected one of {options}")
        elif field != "trained_betas":
            _check_type(name, field, value, fields[field])
    return SimpleNamespace(**values)


def _check_type(name: str, field: str, value: Any, default: Any) -> None:
    expected: tuple[type, ...] = (int, float) if isinstance(default, float) else (type(default),)
    # bool is a subclass of int: a number where a switch is meant, or the reverse, is a mistake in the file.
    if not isinstance(value, expected) or isinstance(value, bool) != isinstance(default, bool):
        raise ValueError(f"scheduler {name}: {field}={value!r} must be of type {expected[-1].__name__}")


def check_steps(name: str, num_steps: int, num_train_timesteps: int) -> None:
    """Raises ValueError unless num_steps is an integer in 1..T."""
    if isinstance(num_steps, bool) or not isinstance(num_steps, (int, np.integer)):
        raise ValueError(f"scheduler {name}: num_steps={num_steps!r} must be an integer")
    if not 1 <= num_steps <= num_train_timesteps:
        raise ValueError(
            f"scheduler {name}: num_steps={num_steps} must be between 1 and num_train_timesteps={num_train_timesteps}"
        )


def spaced_timesteps(options: SimpleNamespace, num_steps: int) -> np.ndarray:
    """Descending timesteps, float64 [n], in [0, T-1]; whole numbers except for "linspace" (Table 2, arXiv 2305.08891).

    As in diffusers' DDIM, PNDM and Euler schedulers; DPM-Solver++ has its own rule. "trailing" keeps the rounding of
    np.arange, which for a few n (61, 103, ...) lays out one timestep too many, -1: `as_timesteps` refuses those.
    """
    total = options.num_train_timesteps
    if options.timestep_spacing == "linspace":
        return np.linspace(0, total - 1, num_steps)[::-1]
    if options.timestep_spacing == "leading":
        return (np.arange(num_steps) * (total // num_steps))[::-1] + float(options.steps_offset)
    return np.round(np.arange(total, 0, -total / num_steps)) - 1


def as_timesteps(name: str, timesteps: np.ndarray, num_train_timesteps: int) -> np.ndarray:
    """Timesteps as int32 [E] if all are whole numbers, else as float32 [E]. Raises ValueError outside [0, T-1]."""
    if timesteps.min() < 0 or timesteps.max() > num_train_timesteps - 1:
        worst = timesteps.max() if timesteps.max() > num_train_timesteps - 1 else timesteps.min()
        raise ValueError(
            f"scheduler {name}: timestep {worst:g} is outside 0..{num_train_timesteps - 1}; "
            "choose another num_steps, steps_offset or timestep_spacing"
        )
    whole = bool(np.all(timesteps == np.round(timesteps)))
    return timesteps.astype(np.int32 if whole else np.float32)


class Prediction(NamedTuple):
    """x0 = x0_x * x + x0_m * m and eps = eps_x * x + eps_m * m for latents x and model output m; each float32 [E]."""

    x0_x: np.ndarray
    x0_m: np.ndarray
    eps_x: np.ndarray
    eps_m: np.ndarray


def prediction(name: str, prediction_type: str, alpha: np.ndarray, sigma: np.ndarray) -> Prediction:
    """Coefficients that read a model output at x = alpha * x0 + sigma * eps, with alpha^2 + sigma^2 = 1.

    alpha, sigma: float32 [E]. "epsilon": m = eps; "sample": m = x0; "v_prediction": m = alpha * eps - sigma * x0.
    Raises ValueError for "epsilon" at zero signal (alpha = 0), where x0 cannot be found; diffusers gives NaN images
    there.
    """
    zero, one = np.zeros_like(alpha), np.ones_like(alpha)
    if prediction_type == "v_prediction":
        return Prediction(x0_x=alpha, x0_m=-sigma, eps_x=sigma, eps_m=alpha)
    if prediction_type == "sample":
        return Prediction(x0_x=zero, x0_m=one, eps_x=1 / sigma, eps_m=-alpha / sigma)
    if np.any(alpha == 0):
        raise ValueError(
            f"scheduler {name}: prediction_type='epsilon' cannot be sampled at zero signal-to-noise "
            "(rescale_betas_zero_snr=True and a timestep at the end); use timestep_spacing='leading' or another "
            "prediction_type, as the model was trained"
        )
    return Prediction(x0_x=1 / alpha, x0_m=-sigma / alpha, eps_x=zero, eps_m=one)


def at(table: np.ndarray, i: jax.Array | int) -> jax.Array:
    """Row `i` of a table; `i` may be traced."""
    return jnp.asarray(table)[i]


def float32(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays in float32, the only dtype in which schedulers compute."""
    return tuple(jnp.asarray(array, jnp.float32) for array in arrays)
