"""The denoising loop: one compiled program per size, number of steps and scheduler, from noise to pixels."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from spqr_jax.backbones import Denoiser
from spqr_jax.devices import mesh as mesh_lib
from spqr_jax.params import Definition, Params
from spqr_jax.sampling.guidance import Guided, Predict, guided_prediction


class Program(NamedTuple):
    """The static part of a sampling program; every other value is an argument of it.

    Attributes:
        denoiser, autoencoder: the models without weights.
        scaling: the scaling of the autoencoder's latents (`Backbone.scaling`).
        guided: whether any image has guidance.
        split: the mesh that the weights are split over, or None. Split weights are gathered anew at every step.
        acts: the parts of attachments inside the loop.
    """

    denoiser: Denoiser
    autoencoder: Definition
    scaling: Any
    guided: bool
    split: Mesh | None
    acts: tuple[Any, ...]


class Batch(NamedTuple):
    """The inputs of B images: their guidance, and for each act a tree of arrays with B rows."""

    given: Guided
    rows: tuple[Any, ...] = ()


@functools.partial(jax.jit, static_argnums=0)
def sample(program: Program, weights: Params, tables: Any, noise: jax.Array, batch: Batch, numbers: tuple[Any, ...]):
    """noise [B, h, w, C] -> (images_u8 [B, H, W, 3], finite [steps + 1, B]).

    weights: {"denoiser", "autoencoder", "attached"}, the last one a tuple with a tree for each act. tables: the
    scheduler's tables. numbers: for each act, the inputs that all images share. Row i of `finite` says whether the
    latents after step i + 1 are finite, and the last row whether the pixels are.
    """

    def gathered(component: str, turn: jax.Array) -> Any:
        if program.split is None:
            return weights[component]
        return mesh_lib.constrain(mesh_lib.each_turn(weights[component], turn), program.split, fsdp=False)

    def body(carry, i):
        latents, state, memories = carry
        model = program.denoiser.definition.bind(gathered("denoiser", latents))
        for act, extra, rows in zip(program.acts, gathered("attached", latents), batch.rows, strict=True):
            act.insert(model, extra, rows)
        at = i, tables.scale_input(latents, i), jnp.asarray(tables.timesteps)[i]
        output, memories = _predict(program, program.denoiser.of_model(model), batch, numbers, memories, at)
        latents, state = tables.step(state, output, i, latents)
        return (latents, state, memories), jnp.isfinite(latents).all((1, 2, 3))

    latents = noise.astype(jnp.float32) * tables.init_noise_sigma
    memories = tuple(act.start(latents) for act in program.acts)
    carry: tuple[Any, ...] = (latents, tables.init_state(latents), memories)
    (latents, *_), finite = jax.lax.scan(body, carry, jnp.arange(len(tables.timesteps)))
    autoencoder = program.autoencoder.bind(gathered("autoencoder", latents))
    pixels = program.denoiser.backbone.decode(autoencoder, latents, program.scaling)
    finite = jnp.concatenate([finite, jnp.isfinite(pixels).all((1, 2, 3))[None]])
    return as_images(pixels), finite


def as_images(pixels: jax.Array) -> jax.Array:
    """Decoded pixels float32 [B, H, W, 3] in -1..1 -> images_u8, as diffusers makes them.

    They are clip(x / 2 + 0.5) times 255, rounded half to even.
    """
    return jnp.round(jnp.clip(pixels / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8)


def _predict(program: Program, predict: Predict, batch: Batch, numbers: tuple, memories: tuple, at: Any):
    """(prediction, memories of the acts) at `at` = (number of the evaluation, latents, time)."""
    for n, act in enumerate(program.acts):
        if act.predicts:
            output, memory = act.predict(predict, batch.given, batch.rows[n], numbers[n], memories[n], at)
            return output, (*memories[:n], memory, *memories[n + 1 :])
    _, latents, time = at
    return guided_prediction(predict, batch.given, program.guided, latents, time), memories


def check_finite(finite: np.ndarray, prompts: Any) -> None:
    """Raise FloatingPointError that names prompt and step if any entry of finite [steps + 1, B] is False."""
    if finite.all():
        return
    step, row = np.argwhere(~finite)[0]
    what = "the decoded pixels are" if step == len(finite) - 1 else f"the latents after step {step + 1} are"
    raise FloatingPointError(f"{what} not finite for prompt {prompts[row]!r}; check the weights, or use float32.")
