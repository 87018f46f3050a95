"""Rematerialisation: a backward pass that computes the activations inside layers again, instead of keeping them."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax

_remat = contextvars.ContextVar("remat", default=False)


@contextlib.contextmanager
def rematerialised() -> Iterator[None]:
    """A context for tracing a call: only activations between layers are kept, and the backward pass computes the others
    again."""
    token = _remat.set(True)
    try:
        yield
    finally:
        _remat.reset(token)


def layer(module: Any, *args: Any) -> Any:
    """module(*args), as one of the layers between which activations are kept."""
    return jax.checkpoint(lambda *a: module(*a))(*args) if _remat.get() else module(*args)
