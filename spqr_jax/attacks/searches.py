"""Searches by gradients, one for each prompt, side by side on all devices; and the measure of their candidates."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec
from tqdm import tqdm

from spqr_jax import params as params_lib
from spqr_jax.backbones import Drawn
from spqr_jax.backbones.models.remat import rematerialised
from spqr_jax.devices import memory
from spqr_jax.devices import mesh as mesh_lib
from spqr_jax.devices import target as target_lib
from spqr_jax.methods.tools import loop
from spqr_jax.methods.tools.loop import Adam, Gradient, Project
from spqr_jax.params import Params
from spqr_jax.training.memory import Way, choose

# Searches on each device at once: a few gradients through a denoiser fill it, and more save no time.
MOST = 8
# Noised pictures that a candidate is measured on.
COUNT = 10

# (static, params, shared, own) -> (a candidate, its loss): what a search has found so far. As in a gradient, params and
# own are those of one search, and shared is what all have.
Look = Callable[..., tuple[Any, jax.Array]]


class Descent(NamedTuple):
    """How every search goes, in functions of a module, as compiled programs are kept by them; and how long.

    Attributes:
        title: in messages.
        gradient: (static, params, i, shared, own) -> loss and gradient of one search in step i.
        look: see `Look`.
        static: what both are compiled for.
        adam: the optimiser.
        steps: in all.
        every: steps from one candidate to the next. The last step gives one too.
        project: as `loop.fit` has it.
    """

    title: str
    gradient: Gradient
    look: Look
    static: Any
    adam: Adam
    steps: int
    every: int
    project: Project | None = None


class Course(NamedTuple):
    """What one search came upon: its C candidates [C, ...], their losses float64 [C], and the steps that it took."""

    candidates: np.ndarray
    losses: np.ndarray
    steps: int

    @property
    def queries(self) -> int:
        """Steps and candidates."""
        return self.steps + len(self.losses)


def stacked(rows: Sequence[Any]) -> Any:
    """Pytrees of N searches as one [N, ...]."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *rows)


def along(descent: Descent, starts: Params, shared: Any, own: Any, progress: bool = False) -> list[Course]:
    """The courses of N searches. starts, own: pytrees [N, ...], of NumPy arrays; shared: a pytree.

    They are split over the devices, `MOST` side by side on each, or as many as fit; each goes as if it were alone, but
    for rounding. A search ends with a loss or gradient that is not finite, and its candidates until then count. Raises
    ValueError for starts of 16 bits, and MemoryError that names the attack if one search on each device does not fit.
    """
    loop.check_trainable(descent.title, starts)
    mesh, count = mesh_lib.make(), len(jax.tree.leaves(starts)[0])
    state = jax.vmap(loop.transform(descent.adam).init)(starts)
    searches, shared = (starts, state, own), mesh_lib.replicate(shared, mesh)
    most = min(MOST, -(-count // mesh.size))
    way = _way(descent, mesh, most, shared, lambda each: _group(searches, 0, each * mesh.size, mesh))
    size = _each(most, way) * mesh.size
    step = _step(descent.gradient, descent.static, descent.adam, descent.project, way.remat, mesh)
    found: list[Course] = []
    with tqdm(total=-(-count // size) * descent.steps, desc=descent.title, disable=not progress) as bar:
        for first in range(0, count, size):
            courses = _courses(descent, step, mesh, shared, _group(searches, first, size, mesh), bar)
            found += courses[: count - first]
    return found


def _group(searches: Any, first: int, size: int, mesh: Mesh) -> Any:
    """`size` searches of a pytree [N, ...], the last one repeated where there are fewer; split over the devices."""
    return mesh_lib.split_batch(
        jax.tree.map(lambda leaf: mesh_lib.pad_batch(leaf[first : first + size], size), searches), mesh
    )


def _courses(descent: Descent, step: Callable, mesh: Mesh, shared: Any, group: Any, bar: tqdm) -> list[Course]:
    """The courses of the searches of a group, all of its devices'."""
    look = _looked(descent.look, descent.static, mesh)
    params, state, own = group
    losses, seen, looked = [], [], []
    for i in range(descent.steps):
        params, state, loss = step(params, state, np.int32(i), shared, own)
        losses.append(loss)
        bar.update()
        if (i + 1) % descent.every == 0 or i + 1 == descent.steps:
            seen.append(i + 1)
            looked.append(look(params, shared, own))
            if not np.isfinite(mesh_lib.to_host(loss)).any():
                break
    finite = np.isfinite(np.stack(mesh_lib.to_host(losses)))  # [steps, searches]
    good = np.logical_and.accumulate(finite, axis=0).sum(0)  # steps before the first that is not finite
    candidates, of_candidates = (np.stack(mesh_lib.to_host([one[k] for one in looked]), axis=1) for k in (0, 1))
    taken = np.minimum(good + 1, descent.steps)
    counts = [int((np.array(seen) <= steps).sum()) for steps in good]
    return [
        Course(candidates[n, :count], of_candidates[n, :count].astype(np.float64), int(taken[n]))
        for n, count in enumerate(counts)
    ]


# --- programs --------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=32)
def _step(gradient: Gradient, static: Any, adam: Adam, project: Project | None, remat: bool, mesh: Mesh):
    """(params, optimiser state, i, shared, own) -> (params, state, losses [N]) of N searches.

    A loss is NaN if its gradient is not finite. remat: keep fewer activations for the backward pass.
    """
    optimiser = loop.transform(adam)

    def one(params: Params, state: Any, i: jax.Array, shared: Any, own: Any):
        with rematerialised() if remat else contextlib.nullcontext():
            loss, grads = gradient(static, params, i, shared, own)
        updates, state = optimiser.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        loss = jnp.where(jnp.isfinite(optax.global_norm(grads)), loss, jnp.nan)
        return project(params) if project else params, state, loss

    return _side_by_side(one, (0, 0, None, None, 0), mesh)


@functools.lru_cache(maxsize=32)
def _looked(look: Look, static: Any, mesh: Mesh):
    """(params, shared, own) -> (candidates, losses [N]) of N searches."""
    return _side_by_side(functools.partial(look, static), (0, None, 0), mesh)


def _side_by_side(function: Callable[..., Any], axes: tuple[int | None, ...], mesh: Mesh):
    """A function of one search for many, split over the devices. axes: 0 for arguments that each search has of its own.

    Devices compute apart from each other: nothing is exchanged.
    """
    split = tuple(PartitionSpec() if axis is None else PartitionSpec("data") for axis in axes)
    each = jax.shard_map(
        jax.vmap(function, axes), mesh=mesh, in_specs=split, out_specs=PartitionSpec("data"), check_vma=False
    )
    return jax.jit(each, compiler_options=target_lib.step_options(target_lib.of(mesh).platform))


# What `_way` has chosen in this process.
_CHOSEN: dict[Any, Way] = {}


def _way(descent: Descent, mesh: Mesh, most: int, shared: Any, group: Callable[[int], Any]) -> Way:
    """How searches fit into the devices: all of `most` on each, or in parts one after the other, at last with remat.

    group: searches on each device -> them, placed.
    """
    what = descent.gradient, descent.static, descent.adam, descent.project
    leaves, structure = jax.tree.flatten((shared, group(most)))
    key = *what, mesh, structure, tuple(jax.typeof(leaf) for leaf in leaves)
    if key not in _CHOSEN:

        def needed(way: Way) -> int | None:
            params, state, own = group(_each(most, way))
            program = _step(*what, way.remat, mesh)
            return memory.needed_bytes(lambda: program.lower(params, state, np.int32(0), shared, own).compile())

        parts = [2**k for k in range(most.bit_length())]
        _CHOSEN[key] = choose(
            [*(Way(k) for k in parts if k <= most), Way(most, remat=True)],
            needed,
            fixed=lambda split: params_lib.nbytes(shared),
            limit=memory.memory_limit(mesh),
            what=descent.title,
            remedy="take a larger device",
        )
    return _CHOSEN[key]


def _each(most: int, way: Way) -> int:
    """Searches on each device in one of the way's parts."""
    return -(-most // way.accumulate)


# --- candidates ------------------------------------------------------------------------------------------------------


def mean_over_times(
    loss: Callable[[Drawn], jax.Array], schedule: jax.Array, latents: jax.Array, key: jax.Array
) -> jax.Array:
    """The mean loss of a picture [1, h, w, C] with `COUNT` noises, at as many times evenly apart; the same for a key.

    One after the other, so that it takes no more memory than a step.
    """
    noise = jax.random.normal(jax.random.fold_in(key, 2**31), (COUNT, *latents.shape))
    times = ((np.arange(COUNT) + 0.5) * len(schedule) / COUNT).astype(np.int32)[:, None]
    return jax.lax.map(lambda one: loss(Drawn(latents, *one)), (noise, jnp.asarray(times))).mean()
