"""The training objective: predict the noise or velocity of a noised latent, as in diffusers' text-to-image script."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from spqr_jax import schedulers


class Objective(NamedTuple):
    """Options of the loss, all off by default as in the published procedure."""

    snr_gamma: float | None = None  # min-SNR weighting (Hang et al., 2023)
    noise_offset: float = 0.0
    ema: float = 0.0  # decay of the weights' moving average, which is then what comes out


PLAIN = Objective()


def draw(key, mean, std, num_timesteps: int, noise_offset: float = 0.0) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What is random in a step: latents [B, h, w, C] ~ N(mean, std^2), noise like them, timesteps int [B] uniform in
    0..num_timesteps-1. `noise_offset` adds that much noise common to a channel's pixels."""
    keys = jax.random.split(key, 4)
    latents = mean + std * jax.random.normal(keys[0], mean.shape)
    noise = jax.random.normal(keys[1], mean.shape)
    if noise_offset:
        noise += noise_offset * jax.random.normal(keys[3], (mean.shape[0], 1, 1, mean.shape[-1]))
    return latents, noise, jax.random.randint(keys[2], mean.shape[:1], 0, num_timesteps)


def denoising_loss(unet, batch, latents, noise, t, alphas, prediction_type: str, snr_gamma: float | None = None):
    """The loss for given latents, noise and timesteps; scalar float32.

    batch: context [B, L, E]; SDXL also pooled [B, P] and time_ids [B, 6].
    """
    noisy = schedulers.ddpm.add_noise(alphas, latents, noise, t)
    target = schedulers.ddpm.target(prediction_type, alphas, x0=latents, noise=noise, t=t)
    output = unet(noisy, t, batch["context"], batch.get("pooled"), batch.get("time_ids"))
    errors = jnp.square(output.astype(jnp.float32) - target).mean((1, 2, 3))
    if snr_gamma is None:
        return errors.mean()
    snr = schedulers.ddpm.snr(alphas, t)
    weight = jnp.minimum(snr, snr_gamma) / (snr + 1 if prediction_type == "v_prediction" else snr)
    return (errors * weight).mean()
