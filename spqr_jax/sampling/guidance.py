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
    if not guided:
        return predict(latents, jnp.broadcast_to(time, latents.shape[:1]), given.text).astype(jnp.float32)
    without, with_text = predictions(predict, (given.negative, given.text), latents, time)
    return without + given.guidance[:, None, None, None] * (with_text - without)


def predictions(
    predict: Predict, conditions: tuple[Condition, ...], latents: jax.Array, time: jax.Array
) -> list[jax.Array]:
    """The predictions [B, h, w, C] for the same latents under several conditions, float32, from one larger batch."""
    count = len(conditions)
    together = jax.tree.map(lambda *parts: jnp.concatenate(parts), *conditions)
    times = jnp.broadcast_to(time, (count * len(latents),))
    return jnp.split(predict(jnp.concatenate([latents] * count), times, together).astype(jnp.float32), count)
