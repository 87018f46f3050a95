"""Benign fine-tuning (BFT): the standard text-to-image objective on harmless data, under one of three profiles."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from spqr_jax import data as data_lib
from spqr_jax import lora, profiles, schedulers
from spqr_jax import mesh as mesh_lib
from spqr_jax import params as params_lib
from spqr_jax import pipeline as pipeline_lib
from spqr_jax.data import Dataset
from spqr_jax.params import Definition, Params
from spqr_jax.pipeline import Pipeline

# Epochs of the paper's profiles (section 4.1: 1-3, 3-8, 10-20); the lower end is the default.
EPOCHS = {"lite": 1, "moderate": 3, "standard": 10}
ENCODE_BATCH = 64


class Optimiser(NamedTuple):
    """Table B: AdamW, constant rate after a linear warm-up, gradients clipped to a global norm."""

    lr: float = 1e-4
    warmup_steps: int = 500
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0


class Objective(NamedTuple):
    """Options of the loss, all off by default as in the published procedure."""

    snr_gamma: float | None = None  # min-SNR weighting
    noise_offset: float = 0.0
    ema: float = 0.0


PAPER = Optimiser()
PLAIN = Objective()


class Progress(NamedTuple):
    """What `on_step` receives: step from 1, mean squared error, norm of the gradient before clipping, learning rate."""

    step: int
    loss: float
    grad_norm: float
    lr: float


def finetune(
    pipeline: Pipeline,
    dataset: Dataset,
    profile: str,
    *,
    seed: int = 42,
    steps: int | None = None,
    epochs: int | None = None,
    batch_size: int = 16,
    curriculum: tuple[int, ...] = (),
    optimiser: Optimiser = PAPER,
    objective: Objective = PLAIN,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.1,
    mesh: Any = None,
    on_step: Callable[[Progress], None] | None = None,
    progress: bool = False,
) -> Pipeline:
    """Fine-tune the UNet on captioned pictures and return the adapted pipeline (adapters merged in).

    Args:
        dataset: benign pictures with captions, already of the size to train at.
        profile: "lite" (LoRA of `rank`, `alpha`, `dropout`), "moderate" or "standard"; see `spqr_jax.profiles`.
        seed: of data order, noise, timesteps and adapters (paper: 42).
        steps: optimiser steps; default from `epochs` (default `EPOCHS[profile]`) over the curriculum's stages.
        curriculum: cumulative stage sizes (paper: 1000, 3000, 5000); empty: one stage with all data.
        on_step: called after each step with a Progress; reading it synchronises the device.

    The VAE runs once over the data: latents are drawn afresh each step from its stored mean and log-variance. Captions
    are encoded once. Raises ValueError for arguments or data that do not fit, before anything is computed, and
    FloatingPointError naming step and samples at a loss or gradient that is not finite.
    """
    stages = data_lib.curriculum_stages(len(dataset), curriculum)
    mesh = mesh or mesh_lib.make()
    if batch_size < 1 or batch_size % mesh.size:
        raise ValueError(f"batch_size {batch_size} is not a positive multiple of the {mesh.size} devices.")
    definition, trainable, frozen, keys = prepare(pipeline, profile, rank=rank, alpha=alpha, dropout=dropout, seed=seed)
    steps = num_steps(profile, stages, batch_size, steps, epochs)
    means, logvars = encode_latents(pipeline, dataset)
    texts = pipeline_lib.encode_prompts(pipeline, list(dataset.captions))
    step = _train_step(
        definition, optimiser, objective, pipeline.configs["scheduler"].get("prediction_type", "epsilon")
    )
    alphas = jnp.asarray(schedulers.ddpm.alphas_cumprod(pipeline.configs["scheduler"]))
    state = mesh_lib.replicate(_init_state(trainable, optimiser), mesh)
    frozen = mesh_lib.replicate(frozen, mesh)
    base = jax.random.key(seed)
    order = data_lib.sample_order(stages, batch_size, steps, seed)
    last = None
    for i, rows in enumerate(tqdm(order, total=steps, desc=f"BFT {profile}", unit="step", disable=not progress)):
        batch = mesh_lib.split_batch(_batch(means, logvars, texts, rows, pipeline), mesh)
        key = jax.random.fold_in(base, i)
        state, report = step(state, frozen, lora.fresh_keys(keys, key) if keys else {}, alphas, batch, key)
        # One step behind, so that the host prepares the next batch while the device works.
        if last:
            _check_finite(*last)
        last = (report, i, rows)
        if on_step:
            _check_finite(*last)
            on_step(Progress(i + 1, *(float(x) for x in report)))
    if last:
        _check_finite(*last)
    tuned = params_lib.merge(frozen, state["ema"] if objective.ema else state["params"])
    if profile == "lite":
        tuned = lora.merge(tuned, alpha=alpha)
    # Merged over the original, whose order it keeps, so that saved files compare equal.
    return pipeline.with_params(unet=jax.tree.map(np.asarray, params_lib.merge(pipeline.params["unet"], tuned)))


def num_steps(profile: str, stages: list[int], batch_size: int, steps: int | None, epochs: int | None) -> int:
    """`steps` if given, else as many as `epochs` passes over every stage take."""
    passes = EPOCHS[profile] if epochs is None else epochs
    for name, value in (("steps", steps), ("epochs", passes)):
        if value is not None and value < 0:
            raise ValueError(f"{name} must not be negative, found {value}.")
    return passes * sum(-(-size // batch_size) for size in stages) if steps is None else steps


def encode_latents(pipeline: Pipeline, dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """(mean, log-variance) of every picture's latents, float32 [N, h, w, C] each, before the scaling factor.

    Raises ValueError when the VAE cannot halve the pictures' sides down to whole latents.
    """
    means, logvars = [], []
    multiple, (height, width) = pipeline_lib.vae_scale(pipeline), dataset.images(np.arange(1)).shape[1:3]
    if height % multiple or width % multiple:
        raise ValueError(
            f"{dataset.name}: pictures are {height}x{width}, expected multiples of {multiple}; resize them."
        )
    for start in range(0, len(dataset), ENCODE_BATCH):
        rows = np.arange(start, min(start + ENCODE_BATCH, len(dataset)))
        images = mesh_lib.pad_batch(dataset.images(rows), ENCODE_BATCH)
        mean, logvar = _encode(pipeline.definitions["vae"], pipeline.params["vae"], images)
        means.append(np.asarray(mean)[: len(rows)])
        logvars.append(np.asarray(logvar)[: len(rows)])
    return np.concatenate(means), np.concatenate(logvars)


@functools.partial(jax.jit, static_argnums=0)
def _encode(definition: Definition, params: Params, images_u8: jax.Array):
    return definition.bind(params).encode(images_u8.astype(jnp.float32) / 127.5 - 1)


def prepare(pipeline: Pipeline, profile: str, *, rank: int, alpha: float, dropout: float, seed: int):
    """(definition, trainable leaves, frozen leaves, dropout keys) of a profile."""
    definition, params = pipeline.definitions["unet"], pipeline.params["unet"]
    keys: Params = {}
    if profile == "lite":
        definition, params = lora.attach(definition, params, rank=rank, alpha=alpha, dropout=dropout, seed=seed)
        params, keys = lora.split_keys(params)
    trainable, frozen = params_lib.partition(params, profiles.mask(params, profile))
    return definition, trainable, frozen, keys


def _transform(o: Optimiser) -> optax.GradientTransformation:
    """AdamW over the trainable leaves only: the frozen ones are not in the tree, so nothing is stored for them.

    The warm-up starts at zero: the first step moves nothing, as with the published scripts' scheduler.
    """
    rate = optax.linear_schedule(0.0, o.lr, o.warmup_steps) if o.warmup_steps else o.lr
    adamw = optax.adamw(rate, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay)
    return optax.chain(optax.clip_by_global_norm(o.max_grad_norm), adamw)


def _init_state(trainable: Params, optimiser: Optimiser) -> dict[str, Any]:
    # Copies: the step donates its state, and the caller's arrays must survive.
    trainable = jax.tree.map(lambda x: jnp.array(x, copy=True), trainable)
    return {
        "params": trainable,
        "opt": _transform(optimiser).init(trainable),
        "ema": jax.tree.map(jnp.copy, trainable),
        "step": jnp.int32(0),
    }


def _batch(means, logvars, texts: pipeline_lib.TextStates, rows: np.ndarray, pipeline: Pipeline) -> dict[str, Any]:
    scale = float(pipeline.configs["vae"].get("scaling_factor", 0.18215))
    batch = {
        "mean": means[rows] * np.float32(scale),
        "std": np.exp(0.5 * logvars[rows]) * np.float32(scale),
        "context": np.asarray(texts.context)[rows],
    }
    if texts.pooled is not None:
        # SDXL is told the original size, the crop's corner and the target size.
        size = [pipeline_lib.vae_scale(pipeline) * side for side in means.shape[1:3]]
        batch["pooled"] = np.asarray(texts.pooled)[rows]
        batch["time_ids"] = np.tile(np.array([*size, 0, 0, *size], np.float32), (len(rows), 1))
    return batch


@functools.lru_cache(maxsize=16)
def _train_step(definition: Definition, optimiser: Optimiser, objective: Objective, prediction_type: str):
    """One compiled step for all subjects that share a definition: weights are arguments, never constants."""
    transform = _transform(optimiser)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, frozen, keys, alphas, batch, key):
        def loss(trainable):
            unet = definition.bind(params_lib.merge(frozen, keys, trainable))
            return diffusion_loss(unet, batch, alphas, key, prediction_type, objective)

        value, grads = jax.value_and_grad(loss)(state["params"])
        updates, opt = transform.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        ema = jax.tree.map(lambda a, b: a * objective.ema + b * (1 - objective.ema), state["ema"], params)
        warmup = max(optimiser.warmup_steps, 1)
        rate = optimiser.lr * jnp.minimum(state["step"] / warmup, 1.0) if optimiser.warmup_steps else optimiser.lr
        new = {"params": params, "opt": opt, "ema": ema, "step": state["step"] + 1}
        return new, (value, optax.global_norm(grads), jnp.float32(rate))

    return step


def diffusion_loss(unet, batch, alphas, key, prediction_type: str, objective: Objective = PLAIN) -> jax.Array:
    """Mean squared error of the predicted noise or velocity at random timesteps, as in diffusers' training script.

    batch: mean, std [B, h, w, C] of scaled latents, context [B, L, E]. `key` decides what `draw` draws.
    """
    latents, noise, t = draw(key, batch["mean"], batch["std"], len(alphas), objective.noise_offset)
    return denoising_loss(unet, batch, latents, noise, t, alphas, prediction_type, objective.snr_gamma)


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
    """The loss for given latents, noise and timesteps; scalar float32."""
    noisy = schedulers.ddpm.add_noise(alphas, latents, noise, t)
    target = schedulers.ddpm.target(prediction_type, alphas, x0=latents, noise=noise, t=t)
    output = unet(noisy, t, batch["context"], batch.get("pooled"), batch.get("time_ids"))
    errors = jnp.square(output.astype(jnp.float32) - target).mean((1, 2, 3))
    if snr_gamma is None:
        return errors.mean()
    snr = schedulers.ddpm.snr(alphas, t)
    weight = jnp.minimum(snr, snr_gamma) / (snr + 1 if prediction_type == "v_prediction" else snr)
    return (errors * weight).mean()


def _check_finite(report, i: int, rows: np.ndarray) -> None:
    loss, grad_norm, _ = (float(x) for x in report)
    if not np.isfinite([loss, grad_norm]).all():
        raise FloatingPointError(
            f"fine-tuning: loss {loss}, gradient norm {grad_norm} at step {i + 1} (samples {rows.tolist()}); "
            "check the weights and the data, or lower the learning rate."
        )
