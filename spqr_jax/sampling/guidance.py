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
    """The predictions [B, h, w, C] for the same latents under several conditions, float32, from one larger batch.

    The rows of an image stand beside each other, so that a batch which is split over devices stays where it is.
    """
    count = len(conditions)
    together = jax.tree.map(lambda *parts: _join(jnp.stack(parts, axis=1)), *conditions)
    times = jnp.broadcast_to(time, (count * len(latents),))
    found = predict(jnp.repeat(latents, count, axis=0), times, together).astype(jnp.float32)
    return list(jnp.moveaxis(found.reshape(-1, count, *found.shape[1:]), 1, 0))


def _join(parts: jax.Array) -> jax.Array:
    """[B, k, ...] as [B k, ...]."""
    return parts.reshape(-1, *parts.shape[2:])
