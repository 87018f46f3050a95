"""The memory of a training step: the fastest way to compute it whose program fits into the devices.

A step can be computed with fewer activations at once (`Memory`), and with weights and optimiser state split over the
devices (fsdp). Neither changes a result beyond rounding. Every such way is a program of its own, whose bytes the
compiler tells before anything runs.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from spqr_jax.backbones import Denoiser
from spqr_jax.devices import mesh as mesh_lib
from spqr_jax.devices import processes
from spqr_jax.devices import target as target_lib
from spqr_jax.devices.memory import gigabytes
from spqr_jax.params import Params
from spqr_jax.training.objective import Objective
from spqr_jax.training.step import Memory, Optimiser, Program, init_state, train_step


class Way(NamedTuple):
    """A way to compute a step, with nothing left open.

    Attributes:
        accumulate, remat: as in `Memory`.
        fsdp: split weights, gradients, optimiser state and average over the devices.
    """

    accumulate: int = 1
    remat: bool = False
    fsdp: bool = False

    @property
    def memory(self) -> Memory:
        return Memory(self.accumulate, self.remat)

    def __str__(self) -> str:
        parts = [*(["split over the devices"] if self.fsdp else []), *(["remat"] if self.remat else [])]
        parts += [f"{self.accumulate} parts"] if self.accumulate > 1 else []
        return ", ".join(parts) or "whole batch"


def open_ways(memory: Memory, fsdp: bool | None, batch_size: int, devices: int) -> list[Way]:
    """The ways that are left open, in the order in which they are tried: what costs least time comes first.

    Rematerialisation computes the forward pass twice. Parts of a batch use the device less well the smaller they are,
    and are always computed with it. Splitting moves all weights between the devices in every part. `fsdp` None: tried
    last, where there are several devices. A part has samples for every device.
    """
    each = batch_size // devices
    parts = [memory.accumulate] if memory.accumulate else [k for k in range(1, each + 1) if each % k == 0] or [1]
    remat = memory.remat is not False
    plain = [(parts[0], False)] if memory.remat is None else []
    splits = [False, True][: min(devices, 2)] if fsdp is None else [fsdp]
    return [Way(k, again, split) for split in splits for k, again in [*plain, *((k, remat) for k in parts)]]


def choose(
    ways: Sequence[Way],
    needed: Callable[[Way], int | None],
    *,
    fixed: Callable[[bool], int],
    limit: int | None,
    what: str,
    remedy: str = "",
) -> Way:
    """The first of the ways whose program fits, the same on every process.

    needed: way -> bytes on each device, None if they are more than the compiler can say. fixed: fsdp -> bytes of what
    no way makes smaller (`Step.fixed_bytes`). A way that cannot fit, by these bytes and by the programs before it, is
    not compiled. limit: bytes that are there; if it is None, or if there is one way only, the first is taken untested.
    Raises MemoryError that names `what`, the bytes and the remedies (default: `remedies`) if none fits.
    """
    tried: dict[Way, int | None] = {}
    for way in ways:
        if limit is None or len(ways) == 1:
            return way
        if not _can_fit(way, tried, fixed(way.fsdp), limit):
            continue
        tried[way] = size = needed(way)
        if processes.agreed(np.array(size is not None and size <= limit)):
            if way != ways[0]:
                logging.warning("%s: computed in another way, so that it fits: %s, %s.", what, way, gigabytes(size))
            return way
        logging.info("%s, %s: takes %s of %s.", what, way, gigabytes(size), gigabytes(limit))
    raise MemoryError(_too_big(what, ways, tried, fixed, limit or 0, remedy or remedies(ways)))


def _can_fit(way: Way, tried: dict[Way, int | None], fixed: int, limit: int) -> bool:
    """Whether a way may fit by what is known. Of a program, all but `fixed` shrinks with the parts at most."""
    alike = [(w, size) for w, size in tried.items() if (w.fsdp, w.remat) == (way.fsdp, way.remat) and size is not None]
    least = [fixed, *(fixed + (size - fixed) * w.accumulate / way.accumulate for w, size in alike)]
    return max(least) <= limit


def _too_big(
    what: str,
    ways: Sequence[Way],
    tried: dict[Way, int | None],
    fixed: Callable[[bool], int],
    limit: int,
    remedies: str,
) -> str:
    sizes = {way: size for way, size in tried.items() if size is not None}
    least = min(sizes, key=lambda way: sizes[way], default=None)
    found = f" takes {gigabytes(sizes[least])} ({least})" if least else " takes more than there is"
    held = fixed(any(way.fsdp for way in ways))
    return (
        f"{what}: the smallest program{found} on each device, of which weights, optimiser state and gradients are "
        f"{gigabytes(held)}; a device has {gigabytes(limit)} for it. To make it fit, {remedies}."
    )


def remedies(ways: Sequence[Way]) -> str:
    """What a config can change where none of its ways fits."""
    given = [f"bft.{name}" for name in Memory._fields if len({getattr(way, name) for way in ways}) == 1]
    found = [f"leave {' and '.join(given)} to be chosen"] if given else []
    if not any(way.fsdp for way in ways):
        found.append("split weights and state over several devices (mesh.fsdp)")
    found += ["take more or larger devices", "use bfloat16 (dtype)", "train on smaller images (bft.resolution)"]
    return ", or ".join(found)


def program(denoiser: Denoiser, optimiser: Optimiser, objective: Objective, way: Way, mesh: Mesh) -> Program:
    """The program that computes a step in this way on these devices."""
    split, platform = mesh if way.fsdp else None, target_lib.of(mesh).platform
    return Program(denoiser, optimiser, objective, way.memory, split, platform)


class Step(NamedTuple):
    """What the programs of a step are compiled from: shapes, and the options that all ways share.

    Attributes:
        denoiser: as in `Program`; so are optimiser and objective.
        trainable, frozen, keys: the leaves that `finetune.prepare` gives, as shapes or arrays.
        schedule: the schedule, or its shape.
        batch: shapes of the step's batch, each leaf [B, ...].
    """

    denoiser: Denoiser
    optimiser: Optimiser
    objective: Objective
    trainable: Params
    frozen: Params
    keys: Params
    schedule: Any
    batch: dict[str, Any]
    mesh: Mesh

    def trace(self, way: Way) -> jax.stages.Traced:
        """The traced program. A run's own arguments have these shapes and places, so it does not compile again."""
        state, frozen = self._placed(way.fsdp)
        step = train_step(program(self.denoiser, self.optimiser, self.objective, way, self.mesh))
        key = jax.eval_shape(lambda: jax.random.key(0))
        return step.trace(state, frozen, self.keys, self.schedule, mesh_lib.batch_shapes(self.batch, self.mesh), key)

    def fixed_bytes(self, fsdp: bool) -> int:
        """Bytes on each device of weights, optimiser state, and the gradients, all of which clipping needs at once."""
        state, frozen = self._placed(fsdp)
        return sum(mesh_lib.bytes_each(tree) for tree in (state, frozen, state["params"]))

    def _placed(self, fsdp: bool) -> tuple[dict[str, Any], Params]:
        """(state, frozen leaves) as shapes on the devices."""
        start = functools.partial(init_state, optimiser=self.optimiser, ema=self.objective.ema > 0)
        state = jax.eval_shape(start, self.trainable)
        return mesh_lib.shapes(state, self.mesh, fsdp=fsdp), mesh_lib.shapes(self.frozen, self.mesh, fsdp=fsdp)
