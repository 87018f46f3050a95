"""Partial sampling: latents part of the way from noise to a picture, which the fine-tuning methods train on."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from spqr_jax.generate import Conditioning, guided_prediction
from spqr_jax.params import Definition, Params


@functools.partial(jax.jit, static_argnums=0)
def partial_sample(
    definition: Definition, params: Params, tables: Any, noise: jax.Array, condition: Conditioning, stop: jax.Array
) -> jax.Array:
    """Latents [B, h, w, C] after `stop` guided steps (a traced number: one program for all) from `noise`."""
    unet = definition.bind(params)

    def body(i, carry):
        latents, state = carry
        t = jnp.asarray(tables.timesteps)[i]
        output = guided_prediction(unet, condition, True, tables.scale_input(latents, i), t)
        return tables.step(state, output, i, latents)

    start = noise.astype(jnp.float32) * tables.init_noise_sigma
    return jax.lax.fori_loop(0, stop, body, (start, tables.init_state(start)))[0]
