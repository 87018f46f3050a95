"""The options with which a method does as little as it can."""

from collections.abc import Mapping
from typing import Any

from spqr_jax.methods import resalign
from spqr_jax.methods.base import Method, defaults

# Options that mean the same wherever they have this name.
VALUES: dict[str, Any] = {
    "images": 2,
    "sampling_steps": 3,
    "image_steps": 2,
    "warmup": 0,
    "prune_batches": 1,
    "sampled": 1,
    "neumann": 1,
    "eighths": (8,),
    "tunings": (resalign.Tuning(1, 1e-4, "gd"),),
}
# Ends of the names of options that count something of which one is the least.
COUNTS = ("steps", "epochs", "rounds", "iterations", "batch_size")


def options(method: Method, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """option -> value, for the options that have a smaller value than their default, and those that are `given`."""
    found = {}
    for name, default in defaults(method).items():
        if name in VALUES:
            found[name] = VALUES[name]
        elif name.endswith(COUNTS) and type(default) is int and default > 1:
            found[name] = 1
    return found | dict(given or {})
