"""The sum of a loss's gradients over batches: a training that takes no step, so it finds room as the others do."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from spqr_jax.methods.tools import loop
from spqr_jax.params import Params


def summed(
    name: str,
    loss: Callable[..., jax.Array],
    static: Any,
    params: Params,
    inputs: Callable[[int], tuple[Any, ...]],
    batches: int,
    *,
    absolute: bool,
    progress: bool = False,
) -> Params:
    """The sum over `batches` of the gradient of loss(static, params, *inputs(i)), or of its absolute value.

    float32 like params, on the host. `loss` is a function of a module, as compiled programs are kept by it. Raises what
    `loop.fit` raises.
    """
    zeros, frozen = jax.tree.map(jnp.zeros_like, params), (params,)
    return loop.on_host(
        loop.fit(
            name,
            _summand(loss, absolute),
            static,
            loop.Sum(),
            zeros,
            lambda i, *_: inputs(i),
            batches,
            frozen=frozen,
            progress=progress,
        )
    )


@functools.cache
def _summand(loss: Callable[..., jax.Array], absolute: bool) -> loop.Gradient:
    """(static, the sum so far, params, *inputs) -> (loss, what to add)."""

    at_params = loop.descent(loss)

    def gradient(static: Any, total: Params, params: Params, *inputs: Any):
        del total
        value, grads = at_params(static, params, *inputs)
        return value, jax.tree.map(jnp.abs, grads) if absolute else grads

    return gradient
