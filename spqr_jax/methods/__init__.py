"""Safety alignment methods: one file each, each with `align(pipeline, concept, *, seed, ...) -> Pipeline`."""

from collections.abc import Callable

from spqr_jax.methods import esd, none, rece, sld, uce
from spqr_jax.methods.concept import Concept
from spqr_jax.pipeline import Pipeline

# What a config or the command line may name.
METHODS: dict[str, Callable[..., Pipeline]] = {
    "none": none.align,
    "uce": uce.align,
    "rece": rece.align,
    "esd": esd.align,
    "sld": sld.align,
}

__all__ = ["METHODS", "Concept"]
