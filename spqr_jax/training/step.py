"""One step of fine-tuning as a compiled program: the optimiser, its state on the devices, and the gradient."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from spqr_jax import params as params_lib
from spqr_jax.backbones import Condition, Denoiser, Drawn
from spqr_jax.backbones.models.remat import rematerialised
from spqr_jax.devices import mesh as mesh_lib
from spqr_jax.devices import target as target_lib
from spqr_jax.params import Params
from spqr_jax.training import lora
from spqr_jax.training.objective import Objective, denoising_loss


class Optimiser(NamedTuple):
    """Table B: AdamW, constant rate after a linear warm-up, gradients clipped to a global norm."""

    lr: float = 1e-4
    warmup_steps: int = 500
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0

    def rate(self, step: jax.Array) -> jax.Array | float:
        """The learning rate of a step, counted from 0. With a warm-up it starts at 0, as in the published scripts."""
        return self.lr * jnp.minimum(step / self.warmup_steps, 1.0) if self.warmup_steps else self.lr


class Memory(NamedTuple):
    """Options that save memory. They change no result.

    An option may be left open, for `spqr_jax.training.memory` to choose. A `Program` has none open.

    Attributes:
        accumulate: number of parts of a batch that are computed one after the other; 0: open.
        remat: keep only the activations between the denoiser's layers, and compute the others again in the backward
            pass; None: open.
    """

    accumulate: int = 1
    remat: bool | None = False


PAPER = Optimiser()
WHOLE = Memory()
OPEN = Memory(0, None)


def transform(o: Optimiser) -> optax.GradientTransformation:
    """Clipping, then AdamW. It gets the trained leaves only, so nothing is stored for frozen ones."""
    rate = optax.linear_schedule(0.0, o.lr, o.warmup_steps) if o.warmup_steps else o.lr
    adamw = optax.adamw(rate, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay)
    return optax.chain(clip(o.max_grad_norm), adamw)


def clip(max_norm: float) -> optax.GradientTransformation:
    """Gradients scaled to a global norm of at most `max_norm`, by one factor, as torch's clip_grad_norm_ does it.

    optax.clip_by_global_norm chooses between two versions of each leaf, and XLA keeps both beside the gradients. For
    the UNet of Stable Diffusion 1.5 on a CPU that took 2.8 GiB more.
    """

    def scaled(grads: Params, _: Params | None) -> Params:
        norm = optax.global_norm(grads)
        factor = jnp.where(norm < max_norm, 1.0, max_norm / norm)
        return jax.tree.map(lambda x: x * factor.astype(x.dtype), grads)

    return optax.stateless(scaled)


def init_state(trainable: Params, optimiser: Optimiser, ema: bool = False) -> dict[str, Any]:
    """The first state: float32 weights, the optimiser's moments, and the average of the weights if `ema`."""
    # Copies: the step donates its state, and the caller's arrays must survive.
    trainable = jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), trainable)
    state = {"params": trainable, "opt": transform(optimiser).init(trainable), "step": jnp.int32(0)}
    return state | ({"ema": jax.tree.map(jnp.copy, trainable)} if ema else {})


def place_state(trainable: Params, optimiser: Optimiser, ema: bool, mesh: Mesh, fsdp: bool) -> dict[str, Any]:
    """The first state on the devices, made there by one program. Under fsdp each device makes its own part."""
    leaves, structure = jax.tree.flatten(mesh_lib.shapes(trainable, mesh, fsdp=fsdp))
    start = _first_state(structure, tuple(leaves), optimiser, ema, mesh, fsdp)
    return start(mesh_lib.place(trainable, mesh, fsdp=fsdp))


@functools.lru_cache(maxsize=16)
def _first_state(structure: Any, leaves: tuple[Any, ...], optimiser: Optimiser, ema: bool, mesh: Mesh, fsdp: bool):
    """The program of `place_state` for weights of these shapes, which fine-tunings of one kind share."""
    start = functools.partial(init_state, optimiser=optimiser, ema=ema)
    state = jax.eval_shape(start, jax.tree.unflatten(structure, leaves))
    return jax.jit(start, out_shardings=mesh_lib.layout(state, mesh, fsdp=fsdp))


class Program(NamedTuple):
    """The static part of a training step; every other value is an argument of it.

    Attributes:
        denoiser: the model in training, with its adapters if the profile has them.
        split: the mesh that state and frozen weights are split over, or None. Each leaf is gathered for its use.
            Gradients and the new state are split like the old state.
        platform: what it is compiled for, as in `devices.target.Target`.
    """

    denoiser: Denoiser
    optimiser: Optimiser
    objective: Objective
    memory: Memory
    split: Mesh | None = None
    platform: str = "cpu"


@functools.lru_cache(maxsize=16)
def train_step(program: Program):
    """One compiled step. Weights are its arguments, so all subjects that share a program share the compiled step.

    The step is a function (state, frozen, dropout keys, schedule, batch, key) -> (state, (loss, gradient norm, rate)).
    Of the dropout keys only the paths matter, since the step draws their values from `key`. The batch has "mean" and
    "std" of the latents, [B, h, w, C] each, "condition", a Condition with B rows, and "weight", float32 [B]. The loss
    is the sum of the samples' errors, each times its weight, so samples that only fill a short batch have weight 0.
    """
    optimiser, objective, split = program.optimiser, program.objective, program.split

    @functools.partial(jax.jit, donate_argnums=0, compiler_options=target_lib.step_options(program.platform))
    def step(state, frozen, keys, schedule, batch, key):
        noising = program.denoiser.backbone.noising
        drawn = noising.draw(key, batch["mean"], batch["std"], schedule, objective.noise_offset)
        own = lora.fresh_keys(keys, key, len(batch["mean"]))
        value, grads = _summed(
            lambda part: _value_and_grad(program, state["params"], frozen, schedule, part),
            Part(batch["condition"], drawn, batch["weight"], own),
            program.memory.accumulate,
        )
        updates, opt = transform(optimiser).update(grads, state["opt"], state["params"])
        new = {"params": optax.apply_updates(state["params"], updates), "opt": opt, "step": state["step"] + 1}
        if objective.ema:
            new["ema"] = _averaged(state["ema"], new["params"], objective.ema)
        new = mesh_lib.constrain(new, split, fsdp=True) if split else new
        return new, (value, optax.global_norm(grads), jnp.float32(optimiser.rate(state["step"])))

    return step


def _averaged(average: Params, params: Params, decay: float) -> Params:
    return jax.tree.map(lambda a, b: a * decay + b * (1 - decay), average, params)


class Part(NamedTuple):
    """What the loss is computed from: a batch, or a part of one. Every leaf is [B, ...].

    Attributes:
        weight: the samples' weights in the loss, float32 [B].
        keys: the dropout keys of the adapters, `lora.fresh_keys`.
    """

    condition: Condition
    drawn: Drawn
    weight: jax.Array
    keys: Params


def _value_and_grad(program: Program, trainable: Params, frozen: Params, schedule: jax.Array, part: Part):
    """(loss, gradient) of one part of a batch."""
    split = program.split
    if split:
        trainable, frozen = mesh_lib.each_turn((trainable, frozen), part)
    value, grads = jax.value_and_grad(lambda p: _loss(program, p, frozen, schedule, part))(trainable)
    return value, mesh_lib.constrain(grads, split, fsdp=True) if split else grads


def _loss(program: Program, trainable: Params, frozen: Params, schedule: jax.Array, part: Part) -> jax.Array:
    dtype = jax.tree.leaves(frozen)[0].dtype if jax.tree.leaves(frozen) else part.condition.context.dtype
    weights = params_lib.merge(frozen, part.keys, params_lib.cast(trainable, dtype))
    if program.split:
        # Split after the cast too, or the compiler gathers before it, in float32.
        weights = mesh_lib.constrain(weights, program.split, fsdp=True)
        weights = mesh_lib.constrain(weights, program.split, fsdp=False)
    predict = program.denoiser.bind(weights)
    denoiser, gamma = program.denoiser, program.objective.snr_gamma
    with rematerialised() if program.memory.remat else contextlib.nullcontext():
        return denoising_loss(denoiser, predict, part.condition, part.drawn, schedule, gamma, part.weight)


def _summed(value_and_grad: Callable[[Part], Any], batch: Part, parts: int):
    """(loss, gradient) of a batch, the sum over `parts` interleaved slices. Every device works on each."""
    if parts == 1:
        return value_and_grad(batch)
    sliced = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)
    first = jax.tree.map(lambda x: x[0], sliced)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(value_and_grad, first))
    total, _ = jax.lax.scan(
        lambda carry, part: (jax.tree.map(jnp.add, carry, value_and_grad(part)), None), zeros, sliced
    )
    return total
