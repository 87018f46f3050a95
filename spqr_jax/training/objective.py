"""The training objective: predict noise or velocity of noised latents, as in diffusers' text-to-image script."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from spqr_jax.backbones import Condition, Denoiser, Drawn
from spqr_jax.backbones.base import Predict


class Objective(NamedTuple):
    """Options of the loss. All are off by default, as in the published procedure."""

    snr_gamma: float | None = None  # min-SNR weighting (Hang et al., 2023)
    noise_offset: float = 0.0  # scale of noise that the pixels of a channel share
    ema: float = 0.0  # decay of the moving average of the weights; above 0 the average is the result


PLAIN = Objective()


def errors(denoiser: Denoiser, predict: Predict, condition: Condition, drawn: Drawn, schedule: jax.Array) -> jax.Array:
    """Squared error of the prediction for drawn latents, noise and times, averaged over an image: float32 [B]."""
    noising = denoiser.backbone.noising
    noisy = noising.mix(schedule, drawn.latents, drawn.noise, drawn.times)
    target = noising.target(denoiser.prediction, schedule, drawn)
    output = predict(noisy, drawn.times, condition)
    return jnp.square(output.astype(jnp.float32) - target).mean((1, 2, 3))


def denoising_loss(
    denoiser: Denoiser,
    predict: Predict,
    condition: Condition,
    drawn: Drawn,
    schedule: jax.Array,
    snr_gamma: float | None = None,
    weight: jax.Array | None = None,
) -> jax.Array:
    """The mean of `errors`, scalar float32, each times its min-SNR weight if `snr_gamma` is given.

    predict: `denoiser` with its weights (`Denoiser.bind`). schedule: the result of `Noising.schedule`. weight: float32
    [B]; with it the result is the sum of the errors, each times its weight, instead of their mean.
    """
    each = errors(denoiser, predict, condition, drawn, schedule)
    if snr_gamma is not None:
        each = each * denoiser.backbone.noising.weight(denoiser.prediction, schedule, drawn.times, snr_gamma)
    return each.mean() if weight is None else (weight * each).sum()
