"""The loop of the methods that learn: one compiled step, over the trained leaves only."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from tqdm import tqdm

from spqr_jax.backbones.models.remat import rematerialised
from spqr_jax.devices import mesh as mesh_lib
from spqr_jax.devices import processes
from spqr_jax.devices import target as target_lib
from spqr_jax.devices.memory import limit_here, needed_bytes
from spqr_jax.methods.tools import element_mask
from spqr_jax.methods.tools.held import Held, hold
from spqr_jax.params import Params
from spqr_jax.training.memory import Way, choose

# (static, params, *inputs) -> (loss, gradient with respect to params); static is hashable, inputs are pytrees.
Gradient = Callable[..., tuple[jax.Array, Params]]
# params -> the nearest params that are allowed, for projected gradient descent.
Project = Callable[[Params], Params]
# What to do about a step that does not fit.
REMEDY = "take a larger device, or a smaller batch where the method has one (docs/methods.md)"


class Adam(NamedTuple):
    """Adam with PyTorch's betas and epsilon; AdamW where `weight_decay` is not zero.

    clip: greatest global norm of the gradient (0: no clipping). warmup: steps of linear warm-up from zero. second_lr:
    the rate of every second step, for methods with two objectives in turn (0: the same).
    """

    lr: float
    weight_decay: float = 0.0
    clip: float = 0.0
    warmup: int = 0
    second_lr: float = 0.0


class Sum(NamedTuple):
    """In the place of Adam: what is trained is the sum of all gradients (`gradients.summed`). Nothing has a rate."""

    lr: float = 0.0


def transform(adam: Adam | Sum) -> optax.GradientTransformation:
    if isinstance(adam, Sum):
        return optax.identity()
    rate: Any = optax.linear_schedule(0.0, adam.lr, adam.warmup) if adam.warmup else adam.lr
    if adam.second_lr:
        rate = lambda count: jnp.where(count % 2, adam.second_lr, adam.lr)  # noqa: E731
    step = optax.adamw(rate, weight_decay=adam.weight_decay) if adam.weight_decay else optax.adam(rate)
    return optax.chain(optax.clip_by_global_norm(adam.clip), step) if adam.clip else step


def descent(loss: Callable[..., jax.Array]) -> Gradient:
    """The gradient of a loss(static, params, *inputs). Call it at module level: compiled programs are kept by it."""

    def gradient(static: Any, params: Params, *inputs: Any):
        return jax.value_and_grad(lambda trained: loss(static, trained, *inputs))(params)

    return gradient


@functools.lru_cache(maxsize=32)
def compiled(
    gradient: Gradient,
    static: Any,
    adam: Adam | Sum,
    remat: bool = False,
    project: Project | None = None,
    platform: str = "",
    split: Mesh | None = None,
    frozen: int = 0,
):
    """(params, optimiser state, element mask or None, *inputs) -> (params, state, (loss, gradient norm)).

    Params and state are donated: the new ones take their memory, and the given arrays are gone.
    remat: keep fewer activations for the backward pass (`rematerialised`). project: applied after every step.
    platform: what it is compiled for (default: what this process computes on). split: the mesh that params, state and
    the first `frozen` inputs are split over, if they are. Every device gathers the weights, computes its rows of the
    other inputs, and keeps its part of gradients, state and new params.
    """
    optimiser = transform(adam)

    options = target_lib.step_options(platform or target_lib.here().platform)

    @functools.partial(jax.jit, donate_argnums=(0, 1), compiler_options=options)
    def update(params, state, mask, *inputs):
        weights = params, inputs[:frozen]
        whole, kept = mesh_lib.constrain(weights, split, fsdp=False) if split else weights
        with rematerialised() if remat else contextlib.nullcontext():
            loss, grads = gradient(static, whole, *kept, *inputs[frozen:])
        grads = mesh_lib.constrain(grads, split, fsdp=True) if split else grads
        grads = element_mask.apply(mask, grads)
        updates, state = optimiser.update(grads, state, params)
        # The updates too: weight decay would move elements whose gradient is zero.
        params = optax.apply_updates(params, element_mask.apply(mask, updates))
        params = project(params) if project else params
        params, state = mesh_lib.constrain((params, state), split, fsdp=True) if split else (params, state)
        return params, state, (loss, optax.global_norm(grads))

    return update


# What `fitting` has chosen in this process: some methods fit the same program thousands of times.
_CHOSEN: dict[Any, Way] = {}


def ways(devices: int) -> tuple[Way, ...]:
    """The ways to compute a step, in the order in which they are tried: on one device, then split over several."""
    alone = Way(), Way(remat=True)
    return alone if devices == 1 else (*alone, *(way._replace(fsdp=True) for way in alone))


class Training(NamedTuple):
    """What the programs of a training's step are compiled for, but for their arguments."""

    gradient: Gradient
    static: Any
    adam: Adam | Sum
    project: Project | None
    frozen: int
    mesh: Mesh

    def update(self, way: Way, platform: str = ""):
        """`compiled` for a way."""
        split = self.mesh if way.fsdp else None
        return compiled(self.gradient, self.static, self.adam, way.remat, self.project, platform, split, self.frozen)


def fitting(name: str, training: Training, held: Held, given: tuple[Any, ...], limit: int | None = None) -> Way:
    """The first of the `ways` to compute a step with these arguments that fits into the devices.

    What is split already stays split. limit: bytes that are there (default: as the device says). What is chosen is
    compiled here and not again. Raises MemoryError that names the method and the bytes if none fits.
    """
    limit = limit or limit_here(jax.local_devices())
    leaves, structure = jax.tree.flatten((held, given))
    split = mesh_lib.split_over(held)
    key = training, structure, tuple(jax.typeof(leaf) for leaf in leaves), split, limit

    def needed(way: Way) -> int | None:
        shapes = held.arguments(given, training.mesh if way.fsdp else None)
        return needed_bytes(lambda: training.update(way).lower(*shapes).compile())

    if key not in _CHOSEN:
        _CHOSEN[key] = choose(
            [way for way in ways(training.mesh.size) if way.fsdp or not split],
            needed,
            fixed=lambda fsdp: held.fixed_bytes(training.mesh if fsdp else None),
            limit=limit,
            what=name,
            remedy=REMEDY,
        )
    return _CHOSEN[key]


def fit(
    name: str,
    gradient: Gradient,
    static: Any,
    adam: Adam | Sum,
    params: Params,
    inputs: Callable[..., tuple[Any, ...]],
    steps: int,
    *,
    frozen: tuple[Any, ...] = (),
    mask: Params | None = None,
    project: Project | None = None,
    progress: bool = False,
) -> Params:
    """`steps` updates of `params` (the trained leaves alone).

    Step i feeds the gradient with `frozen`, trees of weights that no step changes, and with `inputs(i, params,
    *frozen)`. If no way to compute a step fits into one device, the params, the optimiser's state and the frozen
    weights are split over all devices, and `inputs` gets the split ones.
    mask: trained elements, bool like params (default: all). project: applied to the params after every step; a function
    of a module, as compiled programs are kept by it. Raises ValueError for params of 16 bits, MemoryError if no way to
    compute a step fits, and FloatingPointError naming the method and the step at a loss or gradient that is not finite.
    """
    check_trainable(name, params)
    start, training = transform(adam).init, Training(gradient, static, adam, project, len(frozen), mesh_lib.make())
    split = _split_at_once(training.mesh, params, start, mask, frozen)
    held, update = hold(start, params, mask, frozen, split), None
    report: tuple[Any, Any] | None = None
    for i in tqdm(range(steps), desc=name, unit="step", disable=not progress):
        given = inputs(i, held.params, *held.frozen)
        if report:  # one step behind, so that the host prepares the next step while the device works
            check_finite(name, i, *report, adam.lr)
        if update is None:
            way = fitting(name, training, held, given)
            update = training.update(way)
            if way.fsdp and not split:
                split = training.mesh
                held = hold(start, params, mask, frozen, split)
        given = mesh_lib.place_rows(given, split) if split else given
        params_, state, report = update(held.params, held.state, held.mask, *held.frozen, *given)
        held = held._replace(params=params_, state=state)
    if report:
        check_finite(name, steps, *report, adam.lr)
    return held.params


def _split_at_once(mesh: Mesh, params: Params, start: Any, mask: Params | None, frozen: Any) -> Mesh | None:
    """The mesh if weights come split, or are more than one device could hold while the first inputs are made."""
    if mesh.size == 1:  # nothing to find out, in trainings that some methods begin a thousand times
        return None
    limit = limit_here(jax.local_devices())
    whole = Held(params, jax.eval_shape(start, params), mask, frozen)
    too_big = limit is not None and whole.fixed_bytes(None) > limit
    return mesh if processes.agreed(np.array(too_big)) else mesh_lib.split_over((params, frozen))


def check_finite(name: str, step: int, loss: Any, norm: Any, lr: float) -> None:
    """Raise FloatingPointError unless the loss and the gradient norm of step number `step` (from 1) are finite."""
    if not np.isfinite([float(loss), float(norm)]).all():
        raise FloatingPointError(
            f"{name}: loss {float(loss)}, gradient norm {float(norm)} at step {step}; check the weights"
            + (f", or lower the learning rate ({lr})." if lr else ".")
        )


def check_trainable(name: str, params: Params) -> None:
    """Raise ValueError for weights of 16 bits: nearly all of a step of 1e-5 would be lost to their rounding."""
    found = {str(leaf.dtype) for leaf in jax.tree.leaves(params) if np.dtype(leaf.dtype).itemsize < 4}
    if found:
        raise ValueError(
            f"{name}: the weights to train are {', '.join(sorted(found))}, in which small steps are rounded away; load "
            "the pipeline in float32 (a run does so to align, whatever its dtype)."
        )


def check_at_least(name: str, **values: tuple[float, float]) -> None:
    """Raise ValueError naming the argument for any (value, least) with value < least."""
    for argument, (value, least) in values.items():
        if value < least:
            raise ValueError(f"{name}: {argument}={value}, expected at least {least}.")


def on_device(params: Params) -> Params:
    """Every leaf a device array, so that steps do not copy weights."""
    return jax.tree.map(jnp.asarray, params)


def on_host(params: Params) -> Params:
    """Every leaf a whole NumPy array."""
    return mesh_lib.to_host(params)
