"""ResAlign (Li et al., NeurIPS 2025): unlearn so that a simulated benign fine-tuning does not undo it."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from spqr_jax import backbones
from spqr_jax import params as params_lib
from spqr_jax.backbones import Denoiser
from spqr_jax.concepts import Concept
from spqr_jax.methods.base import Method
from spqr_jax.methods.tools import adapters, loop
from spqr_jax.methods.tools import pictures as pictures_lib
from spqr_jax.methods.tools.concepts import completed
from spqr_jax.methods.tools.loop import Adam
from spqr_jax.params import Params
from spqr_jax.pipeline import Pipeline
from spqr_jax.training import lora
from spqr_jax.training.objective import denoising_loss

OPTIMISERS = ("gd", "adam", "whole")


class Tuning(NamedTuple):
    """A simulated fine-tuning: its length, rate, and "gd" or "adam" on the adapters, or "whole": AdamW on the UNet."""

    steps: int
    lr: float
    optimiser: str


# Lengths and rates of the authors' configurations, their optimisers in turn, and the one of the whole UNet.
TUNINGS = (
    *(
        Tuning(steps, lr, ("gd", "adam")[(i + j) % 2])
        for i, steps in enumerate((5, 10, 20, 30))
        for j, lr in enumerate((1e-4, 1e-5, 1e-6))
    ),
    Tuning(5, 1e-6, "whole"),
)


class Static(NamedTuple):
    """The denoiser with adapters, and without."""

    adapted: Denoiser
    base: Denoiser


def align(
    pipeline: Pipeline,
    concept: Concept,
    *,
    seed: int = 0,
    images: int = 400,
    steps: int = 160,
    lr: float = 2e-4,
    weight_decay: float = 0.01,
    meta_rate: float = 0.3,
    resilience: float = 0.8,
    retain_weights: tuple[float, float] = (1.6, 2.0),
    batch_size: int = 1,
    retain_batch_size: int = 4,
    rank: int = 4,
    tunings: tuple[Tuning, ...] = TUNINGS,
    sampled: int = 3,
    neumann: int = 5,
    gamma: float = 1.0,
    pictures: str = "",
    retain_pictures: str = "",
    sampling_steps: int = 50,
    sampling_guidance: float = 7.5,
    progress: bool = False,
) -> Pipeline:
    """Train adapters theta of the UNet's attention, merged at the end, on

        L_h(theta) + resilience (L_h(theta*) - L_h(theta)) + beta MSE(eps_theta, eps_0 on benign images),

    L_h the negated denoising loss on the concept's images and theta* a simulated fine-tuning of theta on benign ones;
    beta rises from the first to the second of `retain_weights` over the second half. The gradient through theta* is the
    Moreau envelope's (`hypergradient`, of `neumann` terms and step gamma), averaged over `sampled` of the `tunings` a
    step and multiplied by `meta_rate`; Adam decays by `weight_decay`. The adapters have `rank`. L_h is of `batch_size`
    images and the last term of `retain_batch_size`.

    Defaults are the paper's for SD1.4 (its script's differ). Ours: images made by the base model instead of the
    published set (or your own: data sources `pictures` and `retain_pictures`), so no DreamBooth-with-prior
    configuration among the tunings; Adam's moments start anew in every simulated fine-tuning (the code carries them
    over). Raises ValueError for SDXL and for fewer `images` than a batch.
    """
    METHOD.check_backbone(pipeline)
    loop.check_at_least("ResAlign", batch_size=(batch_size, 1), neumann=(neumann, 1), tunings=(len(tunings), sampled))
    if unknown := {tuning.optimiser for tuning in tunings} - set(OPTIMISERS):
        raise ValueError(f"ResAlign: tunings with optimiser {sorted(unknown)}; expected some of {OPTIMISERS}.")
    full = completed(concept, pipeline, "retain")
    pictures_lib.check_given(retain_pictures, images, "ResAlign: retain_pictures")
    static, params, rest = adapted(pipeline, rank, seed)
    loop.check_trainable("ResAlign", params)
    options: dict[str, Any] = {"name": "ResAlign", "steps": sampling_steps, "guidance": sampling_guidance}
    options["least"] = max(batch_size, retain_batch_size)
    harmful = pictures_lib.make(pipeline, full.prompts, images, seed=2 * seed, given=pictures, **options)
    options |= {"given": retain_pictures, "option": "retain_pictures"}
    benign = pictures_lib.make(pipeline, full.retain, images, seed=2 * seed + 1, **options)
    schedule = backbones.schedule(pipeline)
    optimiser = loop.transform(Adam(lr, weight_decay))
    state = optimiser.init(params)
    for i in tqdm(range(steps), desc="ResAlign", unit="step", disable=not progress):
        rng, key = np.random.default_rng((seed, i)), jax.random.fold_in(jax.random.key(seed), i)
        beta = ramp(*retain_weights, i / max(steps - 1, 1))
        total = None
        for c in rng.choice(len(tunings), sampled, replace=False):
            draw = Batches(
                schedule, harmful, benign, batch_size, retain_batch_size, rng, jax.random.fold_in(key, int(c))
            )
            loss, grads = outer_gradient(static, params, rest, tunings[c], draw, resilience, beta, neumann, gamma)
            loop.check_finite("ResAlign", i + 1, loss, optax.global_norm(grads), lr)
            total = grads if total is None else jax.tree.map(jnp.add, total, grads)
        grads = jax.tree.map(lambda g: meta_rate * g / sampled, total)
        updates, state = optimiser.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return adapters.merged(pipeline, params, rest, rank)


def adapted(pipeline: Pipeline, rank: int, seed: int) -> tuple[Static, Params, Params]:
    """(static, adapters, frozen weights): A ~ N(0, 0.008^2), B ~ N(0, 0.002^2), so that no gradient starts at zero."""
    denoiser, params, rest = adapters.adapted(pipeline, rank, seed, {"lora_A": 0.008, "lora_B": 0.002})
    return Static(denoiser, backbones.denoiser(pipeline)), params, rest


class Batches(NamedTuple):
    """Where one outer step draws its images and noise from."""

    schedule: jax.Array
    harmful: pictures_lib.Pictures
    benign: pictures_lib.Pictures
    batch_size: int
    retain_batch_size: int
    rng: np.random.Generator
    key: jax.Array

    def take(self, which: str, number: int) -> tuple[Any, jax.Array]:
        """(batch, key) of "harmful", "benign" (to fine-tune on) or "retain" images."""
        pictures = self.harmful if which == "harmful" else self.benign
        size = self.retain_batch_size if which == "retain" else self.batch_size
        return pictures.batch(self.rng.integers(len(pictures), size=size)), jax.random.fold_in(self.key, number)


def outer_gradient(
    static: Static,
    params: Params,
    rest: Params,
    tuning: Tuning,
    draw: Batches,
    resilience: float,
    beta: float,
    neumann: int,
    gamma: float,
) -> tuple[jax.Array, Params]:
    """(outer loss' direct part, its gradient through theta and theta*) for one simulated fine-tuning."""
    tuned = simulate(static, params, rest, tuning, draw)
    harmful, retain, benign = draw.take("harmful", 0), draw.take("retain", 1), draw.take("benign", 2)
    loss, direct = _direct(static, params, rest, draw.schedule, harmful, retain, jnp.float32([1 - resilience, beta]))
    wanted = _harm_gradient(static, tuned, rest, draw.schedule, harmful, jnp.float32(resilience))
    for _ in range(6):
        grads, ratio = _hypergradient(static, neumann, tuned, rest, draw.schedule, benign, wanted, jnp.float32(gamma))
        grads = jax.tree.map(jnp.add, grads, direct)
        if float(ratio) <= 1 and float(optax.global_norm(grads)) <= 0.2:
            return loss, grads
        gamma /= 2
    return loss, direct


def hypergradient(loss: Callable[[Params], jax.Array], tuned: Params, wanted: Params, gamma, terms: int):
    """(gamma v_K, mean of ||J'v|| / ||v||): v <- J'v + wanted from v = 0, J = d Phi / d theta*, for the step
    Phi = theta* - gamma (grad loss(theta*) + theta* - theta) whose fixed point is the Moreau envelope's minimum.

    With gamma = 1 this is the Neumann series of (I + H)^-1 wanted, H the Hessian of the fine-tuning loss at theta*.
    """

    def transposed(v: Params) -> Params:  # the Hessian is symmetric
        product = jax.jvp(jax.grad(loss), (tuned,), (v,))[1]
        return jax.tree.map(lambda x, h: x - gamma * (h + x), v, product)

    v, ratios = wanted, []  # after the first term
    for _ in range(terms - 1):
        moved = transposed(v)
        ratios.append(optax.global_norm(moved) / jnp.maximum(optax.global_norm(v), 1e-30))
        v = jax.tree.map(jnp.add, moved, wanted)
    ratio = jnp.mean(jnp.stack(ratios)) if ratios else jnp.float32(0)
    return jax.tree.map(lambda x: gamma * x, v), ratio


def denoising(static: Static, params: Params, rest, schedule, batch, key) -> jax.Array:
    """The ordinary loss of the adapted denoiser."""
    return _ordinary(static.adapted, params_lib.merge(rest, params), schedule, batch, key)


def _ordinary(denoiser: Denoiser, weights: Params, schedule, batch, key) -> jax.Array:
    drawn = denoiser.draw(key, batch["mean"], batch["std"], schedule)
    return denoising_loss(denoiser, denoiser.bind(weights), batch["condition"], drawn, schedule)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _hypergradient(static: Static, terms: int, tuned, rest, schedule, benign, wanted, gamma):
    return hypergradient(lambda p: denoising(static, p, rest, schedule, *benign), tuned, wanted, gamma, terms)


@functools.partial(jax.jit, static_argnums=0)
def _harm_gradient(static: Static, tuned, rest, schedule, harmful, resilience):
    return jax.grad(lambda p: -resilience * denoising(static, p, rest, schedule, *harmful))(tuned)


def direct_loss(static: Static, params: Params, rest, schedule, harmful, retain, weights) -> jax.Array:
    """weights[0] L_h(theta) + weights[1] MSE(eps_theta, eps_0) on the retained images."""
    harm = -denoising(static, params, rest, schedule, *harmful)
    batch, key = retain
    drawn = static.base.draw(key, batch["mean"], batch["std"], schedule)
    told = static.base.mix(schedule, drawn), drawn.times, batch["condition"]
    before = jax.lax.stop_gradient(static.base.bind(rest)(*told))
    now = static.adapted.bind(params_lib.merge(rest, params))(*told)
    return weights[0] * harm + weights[1] * jnp.square((now - before).astype(jnp.float32)).mean()


@functools.partial(jax.jit, static_argnums=0)
def _direct(static: Static, params, rest, schedule, harmful, retain, weights):
    return jax.value_and_grad(lambda p: direct_loss(static, p, rest, schedule, harmful, retain, weights))(params)


# --- simulated fine-tuning -------------------------------------------------------------------------------------------


def simulate(static: Static, params: Params, rest: Params, tuning: Tuning, draw: Batches) -> Params:
    """theta*: the adapters after a fine-tuning on benign images."""
    if tuning.optimiser == "whole":
        return _whole(static, params, rest, tuning, draw)
    state, adam = _MOMENTS.init(params), jnp.bool_(tuning.optimiser == "adam")
    for i in range(tuning.steps):
        batch = draw.take("benign", 3 + i)
        params, state = _tuning_step(static, params, state, rest, draw.schedule, batch, jnp.float32(tuning.lr), adam)
    return params


_MOMENTS = optax.scale_by_adam()


@functools.partial(jax.jit, static_argnums=0)
def _tuning_step(static: Static, params, state, rest, schedule, batch, lr, adam):
    grads = jax.grad(lambda p: denoising(static, p, rest, schedule, *batch))(params)
    scaled, state = _MOMENTS.update(grads, state)
    return jax.tree.map(lambda p, g, s: p - lr * jnp.where(adam, s, g), params, grads, scaled), state


def _plain_denoising(static: Static, params: Params, schedule, batch, key) -> jax.Array:
    return _ordinary(static.base, params, schedule, batch, key)


_PLAIN = loop.descent(_plain_denoising)


def _whole(static: Static, params: Params, rest: Params, tuning: Tuning, draw: Batches) -> Params:
    """The whole UNet tuned with adapters merged; what it changed in attention, as adapters of the same rank again."""
    rank = next(leaf.shape[1] for path, leaf in params_lib.flatten(params).items() if "lora_A" in path)
    merged = lora.merge(loop.on_host(params_lib.merge(rest, params)), alpha=rank)

    def inputs(i: int, params: Params):
        del params
        return draw.schedule, *draw.take("benign", 3 + i)

    adam = Adam(tuning.lr, 0.01)
    tuned = loop.fit("ResAlign fine-tuning", _PLAIN, static, adam, loop.on_device(merged), inputs, tuning.steps)
    before, after = params_lib.flatten(rest), params_lib.flatten(tuned)
    region, flat = static.base.backbone.require("lora", "ResAlign"), {}
    for path in after:
        if region.search(path):
            layer = path.removesuffix(".kernel")
            down, up = low_rank(np.asarray(after[path]) - np.asarray(before[path]), rank)
            flat[f"{layer}.lora.lora_A.kernel"], flat[f"{layer}.lora.lora_B.kernel"] = down, up
    return loop.on_device(params_lib.unflatten(flat))


def low_rank(delta: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The best A [in, rank] and B [rank, out] with A B near delta [in, out], their singular values shared equally."""
    u, s, vt = np.linalg.svd(delta.astype(np.float64), full_matrices=False)
    root = np.sqrt(s[:rank])
    return (u[:, :rank] * root).astype(delta.dtype), (root[:, None] * vt[:rank]).astype(delta.dtype)


def ramp(low: float, high: float, done: float) -> float:
    """`low` until half is done, then along a sigmoid to `high`."""
    return low if done < 0.5 else low + (high - low) / (1 + math.exp(-12 * (2 * done - 1.5)))


METHOD = Method("resalign", "ResAlign", align, backbones=("sd",), data_options=("pictures", "retain_pictures"))
