"""Benign fine-tuning (BFT): the standard text-to-image objective on harmless data, under one of three profiles."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from tqdm import tqdm

from spqr_jax import data as data_lib
from spqr_jax import params as params_lib
from spqr_jax import pipeline as pipeline_lib
from spqr_jax import profiles, schedulers
from spqr_jax.backbones.models.unet import rematerialised
from spqr_jax.data import Dataset
from spqr_jax.devices import mesh as mesh_lib
from spqr_jax.devices import preemption
from spqr_jax.files import checkpoint
from spqr_jax.params import Definition, Params
from spqr_jax.pipeline import Pipeline
from spqr_jax.training import latents, lora
from spqr_jax.training.objective import PLAIN, Objective, denoising_loss, draw

# Epochs of the paper's profiles (section 4.1: 1-3, 3-8, 10-20); the lower end is the default.
EPOCHS = {"lite": 1, "moderate": 3, "standard": 10}


class Optimiser(NamedTuple):
    """Table B: AdamW, constant rate after a linear warm-up, gradients clipped to a global norm."""

    lr: float = 1e-4
    warmup_steps: int = 500
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0


class Memory(NamedTuple):
    """How a step is computed, not what: `accumulate` parts of a batch one after the other, and `remat` to keep only the
    activations between the UNet's layers and compute the others again in the backward pass."""

    accumulate: int = 1
    remat: bool = False


PAPER = Optimiser()
WHOLE = Memory()


class Progress(NamedTuple):
    """What `on_step` receives: step from 1, mean squared error, norm of the gradient before clipping, learning rate."""

    step: int
    loss: float
    grad_norm: float
    lr: float


class Adapted(NamedTuple):
    """What a fine-tuning made: the adapters ("lite") or the new values of the trained leaves, float32."""

    profile: str
    leaves: Params
    alpha: float


def finetune(pipeline: Pipeline, dataset: Dataset, profile: str, *, seed: int = 42, **options: Any) -> Pipeline:
    """Fine-tune the UNet on captioned pictures and return the adapted pipeline, adapters merged in: `apply` of `train`,
    whose options these are."""
    return apply(pipeline, train(pipeline, dataset, profile, seed=seed, **options))


def apply(pipeline: Pipeline, adapted: Adapted) -> Pipeline:
    """The pipeline with what was trained in place, in the dtype and order of its own weights."""
    unet, tuned = pipeline.params["unet"], adapted.leaves
    if adapted.profile == "lite":
        tuned = lora.merge(params_lib.merge(unet, tuned), alpha=adapted.alpha)
    dtypes = {path: leaf.dtype for path, leaf in params_lib.flatten(unet).items()}
    merged = params_lib.map_with_path(
        lambda path, leaf: np.asarray(leaf).astype(dtypes[path]), params_lib.merge(unet, tuned)
    )
    return pipeline.with_params(unet=merged)


def train(
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
    memory: Memory = WHOLE,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.1,
    mesh: Mesh | None = None,
    fsdp: bool = False,
    latents_cache: Path | None = None,
    checkpoints: Path | None = None,
    checkpoint_every: int = 500,
    on_step: Callable[[Progress], None] | None = None,
    eval_at: Sequence[int] = (),
    on_eval: Callable[[int, Pipeline], None] | None = None,
    progress: bool = False,
) -> Adapted:
    """Train what `profile` says on captioned pictures.

    Args:
        dataset: benign pictures with captions, already of the size to train at.
        profile: "lite" (LoRA of `rank`, `alpha`, `dropout`), "moderate" or "standard"; see `spqr_jax.profiles`.
        seed: of data order, noise, timesteps and adapters (paper: 42).
        steps: optimiser steps; default from `epochs` (default `EPOCHS[profile]`) over the curriculum's stages.
        curriculum: cumulative stage sizes (paper: 1000, 3000, 5000); empty: one stage with all data.
        mesh: devices (default: all).
        fsdp: weights, gradients, optimiser state and average split over the devices, for models that do not fit whole.
        latents_cache: directory where encoded pictures are kept for other subjects; see `spqr_jax.training.latents`.
        checkpoints: directory that holds the state every `checkpoint_every` steps, and when asked to stop
            (`spqr_jax.devices.preemption`); a run that finds a state there continues from it, to the same weights.
        on_step: called after each step with a Progress, one step late, so that the device does not wait for it.
        eval_at: after these many steps, `on_eval(step, adapted pipeline)` is called (0: before the first).

    The VAE runs once over the data: latents are drawn afresh each step from its stored mean and log-variance. Captions
    are encoded once. The pipeline's dtype is the dtype of the computation (bfloat16: mixed precision); what is trained
    and the optimiser's state are float32. Raises ValueError for arguments or data that do not fit, before anything is
    computed, and FloatingPointError naming step and samples at a loss or gradient that is not finite.
    """
    stages = data_lib.curriculum_stages(len(dataset), curriculum)
    mesh = mesh or mesh_lib.make()
    _check_batch(batch_size, memory.accumulate, mesh.size)
    definition, trainable, frozen, keys = prepare(pipeline, profile, rank=rank, alpha=alpha, dropout=dropout, seed=seed)
    steps = num_steps(profile, stages, batch_size, steps, epochs)
    encoded = latents.encode(pipeline, dataset, cache=latents_cache)
    texts = pipeline_lib.encode_prompts(pipeline, list(dataset.captions))
    scheduler = pipeline.configs["scheduler"]
    prediction_type = scheduler.get("prediction_type", "epsilon")
    step = _train_step(definition, optimiser, objective, memory, prediction_type, mesh if fsdp else None)
    alphas = jnp.asarray(schedulers.ddpm.alphas_cumprod(scheduler))
    state = _place_state(trainable, optimiser, objective.ema > 0, mesh, fsdp)
    frozen = mesh_lib.place(frozen, mesh, fsdp=fsdp)
    base = jax.random.key(seed)
    evaluate = set(eval_at) if on_eval else set()

    def result() -> Adapted:
        return Adapted(profile, mesh_lib.to_host(state["ema"] if objective.ema else state["params"]), alpha)

    with checkpoint.Steps(checkpoints, every=checkpoint_every) as saved:
        state, done = saved.restore(state)
        order = enumerate(data_lib.sample_order(stages, batch_size, steps, seed))
        bar = tqdm(total=steps, initial=done, desc=f"BFT {profile}", unit="step", disable=not progress)
        last: tuple[Any, int, np.ndarray] | None = None
        if on_eval and done == 0 and 0 in evaluate:
            on_eval(0, apply(pipeline, result()))
        for i, rows in order:
            if i < done:
                continue
            batch = mesh_lib.split_batch(_batch(encoded, texts, rows, pipeline), mesh)
            key = jax.random.fold_in(base, i)
            drop = lora.fresh_keys(keys, key) if keys else {}
            state, report = step(state, frozen, drop, alphas, batch, key)
            # One step behind, so that the host prepares the next batch while the device works.
            _report(last, on_step)
            last = (report, i, rows)
            bar.update()
            stop = preemption.asked()
            if saved.due(i + 1) or stop or i + 1 in evaluate:
                _report(last, on_step)  # a state that is not finite is never kept
                last = None
                if checkpoints and (saved.due(i + 1) or stop):
                    saved.save(i + 1, state)
                    if stop:
                        raise SystemExit(preemption.EXIT_STATUS)
                if on_eval and i + 1 in evaluate:
                    on_eval(i + 1, apply(pipeline, result()))
        _report(last, on_step)
        bar.close()
    return result()


def _report(last: tuple[Any, int, np.ndarray] | None, on_step: Callable[[Progress], None] | None) -> None:
    """Check a step's loss and pass it on; reading it waits for the device."""
    if last is None:
        return
    report, i, rows = last
    loss, grad_norm, rate = (float(x) for x in mesh_lib.to_host(report))
    if not np.isfinite([loss, grad_norm]).all():
        raise FloatingPointError(
            f"fine-tuning: loss {loss}, gradient norm {grad_norm} at step {i + 1} (samples {rows.tolist()}); "
            "check the weights and the data, or lower the learning rate."
        )
    if on_step:
        on_step(Progress(i + 1, loss, grad_norm, rate))


def num_steps(profile: str, stages: list[int], batch_size: int, steps: int | None, epochs: int | None) -> int:
    """`steps` if given, else as many as `epochs` passes over every stage take."""
    passes = EPOCHS[profile] if epochs is None else epochs
    for name, value in (("steps", steps), ("epochs", passes)):
        if value is not None and value < 0:
            raise ValueError(f"{name} must not be negative, found {value}.")
    return passes * sum(-(-size // batch_size) for size in stages) if steps is None else steps


def _check_batch(batch_size: int, accumulate: int, devices: int) -> None:
    if batch_size < 1 or batch_size % devices:
        raise ValueError(f"batch_size {batch_size} is not a positive multiple of the {devices} devices.")
    if accumulate < 1 or batch_size % (accumulate * devices):
        raise ValueError(f"accumulate {accumulate} does not divide batch_size {batch_size} on {devices} devices.")


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
    return optax.chain(_clip(o.max_grad_norm), adamw)


def _clip(max_norm: float) -> optax.GradientTransformation:
    """Gradients scaled to a global norm of at most `max_norm`, by one factor, as torch's clip_grad_norm_ does it.

    optax.clip_by_global_norm chooses leaf by leaf between two versions, which XLA keeps whole beside the gradients: 2.8
    GiB more for Stable Diffusion 1.5's UNet on a CPU.
    """

    def scaled(grads: Params, _: Params | None) -> Params:
        norm = optax.global_norm(grads)
        factor = jnp.where(norm < max_norm, 1.0, max_norm / norm)
        return jax.tree.map(lambda x: x * factor.astype(x.dtype), grads)

    return optax.stateless(scaled)


def _init_state(trainable: Params, optimiser: Optimiser, ema: bool = False) -> dict[str, Any]:
    # Copies: the step donates its state, and the caller's arrays must survive.
    trainable = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), trainable)
    state = {"params": trainable, "opt": _transform(optimiser).init(trainable), "step": jnp.int32(0)}
    return state | ({"ema": jax.tree.map(jnp.copy, trainable)} if ema else {})


def _place_state(trainable: Params, optimiser: Optimiser, ema: bool, mesh: Mesh, fsdp: bool) -> dict[str, Any]:
    """The first state on the devices; under fsdp made there in parts, since no device could hold the whole."""
    start = functools.partial(_init_state, optimiser=optimiser, ema=ema)
    if not fsdp:
        return mesh_lib.replicate(start(trainable), mesh)
    params = mesh_lib.place(trainable, mesh, fsdp=True)
    return jax.jit(start, out_shardings=mesh_lib.layout(jax.eval_shape(start, params), mesh, fsdp=True))(params)


def _batch(encoded: latents.Latents, texts: pipeline_lib.TextStates, rows: np.ndarray, pipeline: Pipeline):
    drawn = latents.Latents(encoded.mean[rows], encoded.logvar[rows])
    mean, std = drawn.scaled(pipeline_lib.scaling_factor(pipeline))
    batch = {"mean": mean, "std": std, "context": np.asarray(texts.context)[rows]}
    if texts.pooled is not None:
        # SDXL is told the original size, the crop's corner and the target size.
        size = [pipeline_lib.vae_scale(pipeline) * side for side in encoded.mean.shape[1:3]]
        batch["pooled"] = np.asarray(texts.pooled)[rows]
        batch["time_ids"] = np.tile(np.array([*size, 0, 0, *size], np.float32), (len(rows), 1))
    return batch


@functools.lru_cache(maxsize=16)
def _train_step(
    definition: Definition,
    optimiser: Optimiser,
    objective: Objective,
    memory: Memory,
    prediction_type: str,
    split: Mesh | None = None,
):
    """One compiled step for all subjects that share a definition: weights are arguments, never constants.

    split: the mesh that state and frozen weights are split over, if they are: each leaf is gathered where it is used,
    and gradients and the new state are split as the old one.
    """
    transform = _transform(optimiser)

    def loss(trainable, frozen, keys, alphas, part):
        dtype = jax.tree.leaves(frozen)[0].dtype if jax.tree.leaves(frozen) else part["context"].dtype
        weights = params_lib.merge(frozen, keys, params_lib.cast(trainable, dtype))
        unet = definition.bind(mesh_lib.constrain(weights, split, fsdp=False) if split else weights)
        with rematerialised() if memory.remat else contextlib.nullcontext():
            return denoising_loss(
                unet, part, part["latents"], part["noise"], part["t"], alphas, prediction_type, objective.snr_gamma
            )

    def value_and_grad(trainable, frozen, keys, alphas, part):
        if split:
            trainable, frozen = mesh_lib.each_turn((trainable, frozen), part)
        value, grads = jax.value_and_grad(loss)(trainable, frozen, keys, alphas, part)
        return value, mesh_lib.constrain(grads, split, fsdp=True) if split else grads

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, frozen, keys, alphas, batch, key):
        drawn = draw(key, batch["mean"], batch["std"], len(alphas), objective.noise_offset)
        whole = {**batch, **dict(zip(("latents", "noise", "t"), drawn, strict=True))}
        value, grads = _mean_gradient(
            lambda part: value_and_grad(state["params"], frozen, keys, alphas, part), whole, memory.accumulate
        )
        updates, opt = transform.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        warmup = max(optimiser.warmup_steps, 1)
        rate = optimiser.lr * jnp.minimum(state["step"] / warmup, 1.0) if optimiser.warmup_steps else optimiser.lr
        new = {"params": params, "opt": opt, "step": state["step"] + 1}
        if objective.ema:
            decay = objective.ema
            new["ema"] = jax.tree.map(lambda a, b: a * decay + b * (1 - decay), state["ema"], params)
        new = mesh_lib.constrain(new, split, fsdp=True) if split else new
        return new, (value, optax.global_norm(grads), jnp.float32(rate))

    return step


def _mean_gradient(value_and_grad: Callable[[Any], Any], batch: dict[str, jax.Array], parts: int):
    """(loss, gradient) of a batch [B, ...], computed over `parts` interleaved slices, each spread over all devices."""
    if parts == 1:
        return value_and_grad(batch)
    sliced = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)
    first = jax.tree.map(lambda x: x[0], sliced)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(value_and_grad, first))
    total, _ = jax.lax.scan(
        lambda carry, part: (jax.tree.map(jnp.add, carry, value_and_grad(part)), None), zeros, sliced
    )
    return jax.tree.map(lambda x: x / parts, total)
