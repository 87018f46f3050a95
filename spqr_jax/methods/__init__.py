"""Safety alignment methods: one file each, each with `align(pipeline, concept, *, seed, ...) -> Pipeline`."""

import inspect
from collections.abc import Callable
from typing import Any

from spqr_jax.concepts import Concept
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

__all__ = ["METHODS", "Concept", "options"]


def options(name: str) -> tuple[str, ...]:
    """What a config may set of a method: the names of its keyword arguments, and of those that SPM passes on."""
    takes: list[Callable[..., Any]] = [METHODS[name], *([spm.train] if name == "spm" else [])]
    parameters = [p for function in takes for p in inspect.signature(function).parameters.values()]
    return tuple(dict.fromkeys(p.name for p in parameters if p.kind is p.KEYWORD_ONLY))
