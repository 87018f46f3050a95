"""ESD, Erasing Concepts from Diffusion Models (Gandikota et al., ICCV 2023): learn the negatively guided prediction."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax import params as params_lib
from spqr_jax import pipeline as pipeline_lib
from spqr_jax import schedulers
from spqr_jax.concepts import Concept, checked
from spqr_jax.generate import Conditioning
from spqr_jax.methods.tools import loop
from spqr_jax.methods.tools.loop import Adam
from spqr_jax.params import Definition, Params
from spqr_jax.pipeline import Pipeline
from spqr_jax.sampling.partial import partial_sample

CROSS = re.compile(r"(^|\.)attn2\.")
NOT_U = re.compile(r"(^|\.)(attn2|time_embedding|add_embedding)\.|^(conv_norm_out|conv_out)\.")


def trained(params: Params, method: str) -> Params:
    """Mask of the paper's variants: "esd-x" every attn2 parameter, "esd-u" everything but attn2, the time embedding (in
    SDXL also the added one) and the output layers (the 2023 code's `xattn` and `noxattn`)."""
    if method not in ("esd-x", "esd-u"):
        raise ValueError(f'ESD method must be "esd-x" or "esd-u", found {method!r}.')
    return params_lib.map_with_path(
        lambda path, _: bool(CROSS.search(path)) if method == "esd-x" else not NOT_U.search(path), params
    )


class Texts(NamedTuple):
    """What the UNet is told: context [J, L, E]; SDXL also pooled [J, P] and time_ids [J, 6], else None. The last of the
    J rows is no text."""

    context: Any
    pooled: Any = None
    time_ids: Any = None

    def rows(self, index: np.ndarray) -> "Texts":
        return Texts(*(None if field is None else field[index] for field in self))


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
    concept's texts. Defaults are the authors' for nudity on SD1.x; Adam without decay.

    SDXL: the authors' 2025 code has "esd-x" at lr 2e-4 for 200 steps, guidance 2, and a target that equals eta = 0
    here (their eta counts one more); its "esd-u" (lr 1e-5) leaves out norms and layers outside the blocks, ours does
    not. Here x_t is DDIM's in SDXL too, not the scaled Euler sample.
    """
    checked(concept, pipeline)
    unet = loop.on_device(pipeline.params["unet"])
    train, _ = params_lib.partition(unet, trained(unet, method))
    tuned = fit(
        method,
        pipeline,
        concept,
        params_lib.merge,
        unet,
        train,
        Adam(lr),
        seed=seed,
        steps=steps,
        eta=eta,
        batch_size=batch_size,
        sampling_steps=sampling_steps,
        sampling_guidance=sampling_guidance,
        progress=progress,
    )
    return pipeline.with_params(unet=loop.on_host(params_lib.merge(unet, tuned)))


def fit(
    name: str,
    pipeline: Pipeline,
    concept: Concept,
    build: Callable[[Params, Any], Params],
    frozen: Params,
    params: Any,
    adam: Adam,
    *,
    seed: int,
    steps: int,
    eta: float,
    batch_size: int,
    sampling_steps: int,
    sampling_guidance: float,
    progress: bool,
) -> Any:
    """`params` after `steps` of ESD's loss, where build(frozen, params) is the student UNet's weights."""
    definition, config = pipeline.definitions["unet"], pipeline.configs["unet"]
    tables = schedulers.create("ddim", {**pipeline.configs["scheduler"], "clip_sample": False}, sampling_steps)
    shape = (batch_size, config["sample_size"], config["sample_size"], config["in_channels"])
    span = int(pipeline.configs["scheduler"].get("num_train_timesteps", 1000)) // sampling_steps
    texts = encode(pipeline, concept.erase)

    def inputs(i: int, params: Any):
        rng = np.random.default_rng((seed, i))
        positive = texts.rows(rng.integers(len(concept.erase), size=batch_size))
        empty = texts.rows(np.full(batch_size, -1))
        scale = np.full(batch_size, sampling_guidance, np.float32)
        condition = Conditioning(
            positive.context, empty.context, scale, positive.pooled, empty.pooled, positive.time_ids
        )
        k = int(rng.integers(sampling_steps))
        noise = rng.standard_normal(shape, np.float32)
        # After `sampling_steps - 1 - k` steps the latents stand at the timestep of step k counted from the clean end.
        student = build(frozen, params)
        latents = partial_sample(definition, student, tables, noise, condition, sampling_steps - 1 - k)
        t = rng.integers(k * span, (k + 1) * span, size=batch_size).astype(np.int32)
        return frozen, latents, t, positive, empty, np.float32(eta)

    static = (definition, build)
    return loop.fit(f"{name} {concept.name}", _GRADIENT, static, adam, params, inputs, steps, progress=progress)


def encode(pipeline: Pipeline, prompts: tuple[str, ...]) -> Texts:
    """The prompts and, last, no text; for SDXL as sampling has it, with zeros where the pipeline's index says so."""
    states = pipeline_lib.encode_prompts(pipeline, [*prompts, ""])
    context = np.array(states.context)
    if states.pooled is None:
        return Texts(context)
    pooled = np.array(states.pooled)
    if pipeline.configs.get("model_index", {}).get("force_zeros_for_empty_prompt", True):
        context[-1], pooled[-1] = 0, 0
    side = pipeline_lib.default_size(pipeline)
    return Texts(context, pooled, np.tile(np.array([side, side, 0, 0, side, side], np.float32), (len(context), 1)))


def erasing_loss(unet, frozen_unet, latents, t, context, empty, eta) -> jax.Array:
    """The loss above; unet and frozen_unet are callables (latents, t, context) -> prediction."""
    conditional, unconditional = frozen_unet(latents, t, context), frozen_unet(latents, t, empty)
    target = jax.lax.stop_gradient(unconditional - eta * (conditional - unconditional))
    return jnp.square(unet(latents, t, context) - target).mean()


def loss(static: Any, params: Any, frozen: Params, latents, t, positive: Texts, empty: Texts, eta) -> jax.Array:
    definition, build = static
    student, teacher = _told(definition, build(frozen, params)), _told(definition, frozen)
    return erasing_loss(student, teacher, latents, t, positive, empty, eta)


def _told(definition: Definition, params: Params):
    unet = definition.bind(params)
    return lambda latents, t, texts: unet(latents, t, *texts)


_GRADIENT = loop.descent(loss)
