"""ESD, Erasing Concepts from Diffusion Models (Gandikota et al., ICCV 2023): learn the negatively guided prediction."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from spqr_jax import params as params_lib
from spqr_jax import pipeline as pipeline_lib
from spqr_jax import schedulers
from spqr_jax.generate import Conditioning
from spqr_jax.methods.concept import Concept, checked
from spqr_jax.methods.sampling import partial_sample
from spqr_jax.params import Definition, Params
from spqr_jax.pipeline import Pipeline

CROSS = re.compile(r"(^|\.)attn2\.")
NOT_U = re.compile(r"(^|\.)(attn2|time_embedding)\.|^(conv_norm_out|conv_out)\.")


def trained(params: Params, method: str) -> Params:
    """Mask of the paper's variants: "esd-x" every attn2 parameter, "esd-u" everything but attn2, the time embedding and
    the output layers (the 2023 code's `xattn` and `noxattn`)."""
    if method not in ("esd-x", "esd-u"):
        raise ValueError(f'ESD method must be "esd-x" or "esd-u", found {method!r}.')
    return params_lib.map_with_path(
        lambda path, _: bool(CROSS.search(path)) if method == "esd-x" else not NOT_U.search(path), params
    )


def align(
    pipeline: Pipeline,
    concept: Concept,
    *,
    seed: int = 0,
    method: str = "esd-u",
    steps: int = 1000,
    lr: float = 1e-5,
    eta: float = 1.0,
    batch_size: int = 1,
    sampling_steps: int = 50,
    sampling_guidance: float = 3.0,
    progress: bool = False,
) -> Pipeline:
    """Train the conditional prediction towards the frozen model's prediction pushed away from the concept.

    Loss (paper eq. 7): mean squared error of eps(x_t, c, t) and eps*(x_t, t) - eta (eps*(x_t, c, t) - eps*(x_t, t)),
    eps* frozen; the same affine combination holds for velocity prediction. x_t: the student's own guided DDIM sample
    down to a random step k of `sampling_steps`, t uniform within that step, as in the 2023 code. (That code drops the
    noisiest step, so its x_t is two to three steps cleaner than t; here x_t and t agree.) Each sample draws one of the
    concept's texts. Defaults are the authors' for nudity; Adam without decay.
    """
    concept = checked(concept, pipeline.tokenizers["tokenizer"])
    definition, frozen = pipeline.definitions["unet"], pipeline.params["unet"]
    train, rest = params_lib.partition(frozen, trained(frozen, method))
    optimiser = optax.adam(lr)
    update = _update(definition, lr)
    tables = schedulers.create("ddim", {**pipeline.configs["scheduler"], "clip_sample": False}, sampling_steps)
    states = pipeline_lib.encode_prompts(pipeline, [*concept.erase, ""])
    context, empty = np.asarray(states.context)[:-1], np.asarray(states.context)[-1]
    if states.pooled is not None:
        raise ValueError("ESD on SDXL is not implemented; use an SD1.x or SD2.x pipeline.")
    side = pipeline.configs["unet"]["sample_size"]
    shape = (batch_size, side, side, pipeline.configs["unet"]["in_channels"])
    span = int(pipeline.configs["scheduler"].get("num_train_timesteps", 1000)) // sampling_steps
    opt, params = optimiser.init(train), train
    for i in tqdm(range(steps), desc=f"{method} {concept.name}", unit="step", disable=not progress):
        rng = np.random.default_rng((seed, i))
        texts = context[rng.integers(len(context), size=batch_size)]
        negative = np.repeat(empty[None], batch_size, axis=0)
        scale = jnp.full(batch_size, sampling_guidance, jnp.float32)
        condition = Conditioning(jnp.asarray(texts), jnp.asarray(negative), scale)
        k = int(rng.integers(sampling_steps))
        noise = rng.standard_normal(shape, np.float32)
        student = params_lib.merge(rest, params)
        # After `sampling_steps - 1 - k` steps the latents stand at the timestep of step k counted from the clean end.
        latents = partial_sample(definition, student, tables, noise, condition, sampling_steps - 1 - k)
        t = rng.integers(k * span, (k + 1) * span, size=batch_size).astype(np.int32)
        params, opt, loss = update(params, opt, rest, frozen, latents, t, texts, negative, jnp.float32(eta))
    if steps and not np.isfinite(float(loss)):
        raise FloatingPointError(f"ESD: the loss is {float(loss)} after {steps} steps; lower the learning rate ({lr}).")
    return pipeline.with_params(unet=jax.tree.map(np.asarray, params_lib.merge(frozen, params)))


def erasing_loss(unet, frozen_unet, latents, t, context, empty, eta) -> jax.Array:
    """The loss above; unet and frozen_unet are callables (latents, t, context) -> prediction."""
    conditional, unconditional = frozen_unet(latents, t, context), frozen_unet(latents, t, empty)
    target = jax.lax.stop_gradient(unconditional - eta * (conditional - unconditional))
    return jnp.square(unet(latents, t, context) - target).mean()


@functools.lru_cache(maxsize=4)
def _update(definition: Definition, lr: float):
    optimiser = optax.adam(lr)

    @jax.jit
    def update(params, opt, rest, frozen, latents, t, context, empty, eta):
        def loss(trained):
            student = definition.bind(params_lib.merge(rest, trained))
            return erasing_loss(student, definition.bind(frozen), latents, t, context, empty, eta)

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt = optimiser.update(grads, opt)
        return optax.apply_updates(params, updates), opt, value

    return update
