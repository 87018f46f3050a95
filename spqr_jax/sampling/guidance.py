"""Classifier-free guidance: the texts of a batch of images, and the guided prediction."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from spqr_jax.backbones.base import Array, Condition, Predict


class Guided(NamedTuple):
    """The guidance of one batch of B images: B prompts, B rows of the negative prompt, and the scales [B]."""

    text: Condition
    negative: Condition
    guidance: Array


def guided_prediction(predict: Predict, given: Guided, guided: bool, latents: jax.Array, time: jax.Array) -> jax.Array:
    """The prediction under classifier-free guidance: negative + guidance * (positive - negative), float32 [B, h, w, C].

    If `guided` is False, it is the prompts' own prediction. time: scalar.
    """
    batch = latents.shape[0]
    if not guided:
        return predict(latents, jnp.broadcast_to(time, (batch,)), given.text).astype(jnp.float32)
    condition = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), given.negative, given.text)
    times = jnp.broadcast_to(time, (2 * batch,))
    output = predict(jnp.concatenate([latents, latents]), times, condition).astype(jnp.float32)
    without, with_text = jnp.split(output, 2)
    return without + given.guidance[:, None, None, None] * (with_text - without)
