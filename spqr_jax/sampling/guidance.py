"""Classifier-free guidance: what a batch of images is denoised under, and the guided prediction."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from spqr_jax.backbones.base import Array, Condition, Predict


class Guided(NamedTuple):
    """What one batch of B images is denoised under: its prompts, the negative prompt, and the guidance scale [B]."""

    text: Condition
    negative: Condition
    guidance: Array


def guided_prediction(predict: Predict, given: Guided, guided: bool, latents: jax.Array, time: jax.Array) -> jax.Array:
    """The prediction under classifier-free guidance: negative + guidance * (positive - negative), float32.

    Without `guided`, the prompts' own prediction.
    """
    batch = latents.shape[0]
    if not guided:
        return predict(latents, jnp.broadcast_to(time, (batch,)), given.text).astype(jnp.float32)
    condition = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), given.negative, given.text)
    times = jnp.broadcast_to(time, (2 * batch,))
    output = predict(jnp.concatenate([latents, latents]), times, condition).astype(jnp.float32)
    without, with_text = jnp.split(output, 2)
    return without + given.guidance[:, None, None, None] * (with_text - without)
