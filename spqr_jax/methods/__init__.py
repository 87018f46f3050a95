"""Safety alignment methods: one file each, each with `align(pipeline, concept, *, seed, ...) -> Pipeline`."""

from collections.abc import Callable

from spqr_jax.methods import (
    advunlearn,
    erasediff,
    esd,
    fmn,
    mace,
    modular_lora,
    none,
    rece,
    resalign,
    safety_dpo,
    salun,
    scissorhands,
    sld,
    spm,
    stereo,
    uce,
)
from spqr_jax.methods.concept import Concept
from spqr_jax.pipeline import Pipeline

# What a config or the command line may name.
METHODS: dict[str, Callable[..., Pipeline]] = {
    "none": none.align,
    "uce": uce.align,
    "rece": rece.align,
    "esd": esd.align,
    "sld": sld.align,
    "modular_lora": modular_lora.align,
    "mace": mace.align,
    "spm": spm.align,
    "fmn": fmn.align,
    "salun": salun.align,
    "erasediff": erasediff.align,
    "scissorhands": scissorhands.align,
    "stereo": stereo.align,
    "advunlearn": advunlearn.align,
    "resalign": resalign.align,
    "safety_dpo": safety_dpo.align,
}

__all__ = ["METHODS", "Concept"]
