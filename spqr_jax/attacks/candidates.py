"""What a search by gradients compares: the candidates along its way, and the noised pictures they are measured on."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax.backbones import Drawn
from spqr_jax.methods.tools import loop
from spqr_jax.methods.tools.loop import Adam, Gradient, Project
from spqr_jax.methods.tools.word_vectors import Static
from spqr_jax.params import Params

COUNT = 10


class Descent(NamedTuple):
    """A search: its gradient and optimiser, its steps, and how often it is looked at.

    Attributes:
        title: in messages.
        gradient, static, adam, project: as `loop.fit` has them.
        read: params -> a candidate.
        steps: in all.
        every: steps from one candidate to the next.
    """

    title: str
    gradient: Gradient
    static: Static
    adam: Adam
    read: Callable[[Params], np.ndarray]
    steps: int
    every: int
    project: Project | None = None


def along(
    descent: Descent, start: Params, inputs: Callable[[int], tuple[Any, ...]], progress: bool
) -> tuple[list[np.ndarray], int]:
    """(the candidates after every `every` steps and after the last, the number of steps taken).

    inputs: as `loop.fit` has it, of the number of the step alone. The search ends at a loss that is not finite, and
    candidates until then count.
    """
    found, taken = [], 0

    def given(i: int, params: Params) -> tuple[Any, ...]:
        nonlocal taken
        if i and i % descent.every == 0:
            found.append(descent.read(params))
        taken = i + 1
        return inputs(i)

    title, gradient, static, adam = descent[:4]
    with contextlib.suppress(FloatingPointError):
        last = loop.fit(
            title, gradient, static, adam, start, given, descent.steps, project=descent.project, progress=progress
        )
        found.append(descent.read(last))
    return found, taken


def spread(schedule: jax.Array, latents: np.ndarray, key: jax.Array) -> Drawn:
    """`COUNT` times a picture [1, h, w, C], with noises of their own, at times evenly apart; the same for a key."""
    noise = jax.random.normal(jax.random.fold_in(key, 2**31), (COUNT, *latents.shape[1:]))
    times = ((np.arange(COUNT) + 0.5) * len(schedule) / COUNT).astype(np.int32)
    return Drawn(jnp.repeat(latents, COUNT, axis=0), noise, jnp.asarray(times))
