"""Latent inversion: the noise from which the pipeline draws a picture of the concept, by running DDIM backwards."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from spqr_jax import backbones
from spqr_jax.attacks import base
from spqr_jax.attacks.base import Attack, Attacked
from spqr_jax.backbones import Denoiser
from spqr_jax.concepts import Concept
from spqr_jax.methods.tools import loop
from spqr_jax.params import Params
from spqr_jax.pipeline import Pipeline
from spqr_jax.sampling import partial
from spqr_jax.sampling.guidance import Guided, guided_prediction
from spqr_jax.schedulers.ddim import DDIM


def attack(
    pipeline: Pipeline,
    prompts: Sequence[str],
    concept: Concept,
    *,
    seed: int,
    target: Pipeline | None = None,
    steps: int = 50,
    rounds: int = 5,
    guidance: float = 7.5,
    image_steps: int = 50,
    image_guidance: float = 7.5,
    progress: bool = False,
) -> Attacked:
    """z_T such that `steps` steps of DDIM from it, under the prompt, end at the latents z_0 of a picture of the prompt
    that `target` draws.

    A step of DDIM is y = a x + b eps(x, t), from the noisier x. It is solved for x, from the last step to the first, by
    `rounds` evaluations of x <- (y - b eps(x, t)) / a, from x = y; one round is DDIM inversion as it is usual. Prompts
    stay as they are. loss: mean squared distance from z_0 of what DDIM makes of z_T. queries: evaluations of the
    denoiser, without those that the loss takes. A prompt without a finite loss keeps noise of its own.

    This is a probe: it asks whether the pipeline can still draw such a picture, from a start that may be rare. Its
    images should be drawn as it was sought: with `guidance` and `steps` of DDIM that does not clip latents, or of
    another scheduler without noise of its own, which ends near by if steps are many. After Rusanovsky et al. (Memories
    of Forgotten Concepts, CVPR 2025), whose code inverts without guidance, by ReNoise (5 rounds, averaged, with a
    penalty that keeps the noise normal) or null-text inversion, after an inversion of the autoencoder; their success is
    the similarity of the picture (PSNR) and the likelihood of z_T. Here no penalty acts, the autoencoder's mean is z_0,
    and guidance is that of drawing.
    """
    least = {"steps": (steps, 1), "rounds": (rounds, 1), "guidance": (guidance, 0)}
    _, target = base.checked(ATTACK, pipeline, prompts, concept, target, **least)
    sampler = partial.sampler(pipeline, steps, guidance)
    weights = loop.on_device(base.drawing_weights(pipeline))
    said = backbones.condition(pipeline, [*prompts, ""])
    scale, guided = np.full(1, guidance, np.float32), guidance > 1
    found, losses, seeds, spares = [], [], [], []
    for prompt in prompts:
        rng = base.generator(seed, prompt)
        seeds.append(int(rng.integers(2**31)))
        spares.append(rng.standard_normal((1, *sampler.shape), np.float32))
    pictures = base.pictures(target, prompts, seeds, image_steps, image_guidance)
    for row, picture in enumerate(tqdm(pictures, desc=ATTACK.title, unit="prompt", disable=not progress)):
        given = Guided(said.rows(slice(row, row + 1)), said.rows(slice(-1, None)), scale)
        start = inverted(sampler.denoiser, weights, sampler.tables, picture, given, guided, rounds)
        drawn = partial.partial_sample(
            sampler.denoiser, weights, sampler.tables, start, given, jnp.int32(steps), guided
        )
        loss = float(jnp.square(drawn - picture).mean())
        losses.append(loss if np.isfinite(loss) else np.nan)
        found.append(np.asarray(start) if np.isfinite(loss) else spares[row])
    return Attacked(
        tuple(prompts),
        latents=np.concatenate(found),
        loss=np.array(losses),
        queries=len(prompts) * steps * rounds,
    )


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def inverted(
    denoiser: Denoiser, params: Params, tables: DDIM, latents: Any, given: Guided, guided: bool, rounds: int
) -> jax.Array:
    """The noise [B, h, w, C] from which DDIM's steps lead to the latents [B, h, w, C]."""
    predict = denoiser.bind(params)
    of_latents, of_output = (
        jnp.asarray(tables.next_alpha * x0 + tables.next_sigma * noise)
        for x0, noise in ((tables.x0_x, tables.eps_x), (tables.x0_m, tables.eps_m))
    )
    count = len(tables.timesteps)

    def back(n: jax.Array, after: jax.Array) -> jax.Array:
        i = count - 1 - n
        t = jnp.asarray(tables.timesteps)[i]

        def closer(_: jax.Array, before: jax.Array) -> jax.Array:
            output = guided_prediction(predict, given, guided, before, t)
            return (after - of_output[i] * output) / of_latents[i]

        return jax.lax.fori_loop(0, rounds, closer, after)

    return jax.lax.fori_loop(0, count, back, jnp.asarray(latents, jnp.float32))


ATTACK = Attack("latent_inversion", "Latent inversion", attack, "white-box", backbones=("sd",))
