"""Settings of the methods on the emoji world, tried on prompts that no run scores: drawn with seed 1 instead of 0.

    python launch.py --config configs/mini_settings.py --stages align,generate,judge
    python -m spqr_jax.report aligned runs/mini_settings

A method does its job here when h falls to half of the control's at most and CLIPScore keeps nine tenths. Tried are
changes of one or two options of configs/table1_mini.py, towards more erasing where h stayed high there and towards less
where CLIPScore fell. Nothing is fine-tuned: the whole run would be without use.
"""

from collections.abc import Mapping
from typing import Any

from configs import table1_mini
from spqr_jax.config import Config, Subject

TRIED: dict[str, tuple[Mapping[str, Any], ...]] = {
    "UCE": ({"preserve_scale": 1.0}, {"preserve_scale": 10.0}),
    "RECE": tuple({"preserve_scale": x, "start_options": {"preserve_scale": x}} for x in (1.0, 10.0)),
    "ESD": ({"steps": 60}, {"steps": 40}),
    "Modular LoRA": ({"lr": 5e-4}, {"lr": 3e-4}),
    "SLD": tuple({"strength": {"warmup": 1, "scale": x}} for x in (300, 100)),
    "FMN": ({"lr": 1e-4}, {"lr": 4e-4}),
    "EraseDiff": ({"lr": 2e-5}, {"lr": 4e-5}),
    "SalUn": ({"alpha": 1.0}, {"alpha": 10.0}),
    "Scissorhands": ({"sparsity": 0.9995}, {"sparsity": 0.9999}),
    "AdvUnlearn": ({"gamma": 1.0}, {"steps": 70}),
    "MACE": ({"prior_scale": 7e-5, "fuse_prior_scale": 7e-5},),
    "STEREO": ({"final_steps": 20},),
    "SPM": ({"steps": 60, "warmup": 6},),
}


def get_config() -> Config:
    config = table1_mini.get_config()
    known = {subject.name: subject for subject in config.subjects}
    changed = [_changed(known[name], change) for name, changes in TRIED.items() for change in changes]
    config.subjects = (known["No alignment"], *changed)
    config.seed = 1
    config.bft.profiles, config.bft.scenarios = ("standard",), ("general",)
    return config


def _changed(subject: Subject, change: Mapping[str, Any]) -> Subject:
    """The subject with some options changed, and named after them."""
    options = {**subject.options, **change}
    words = ", ".join(f"{key} {_said(value)}" for key, value in change.items())
    return Subject(f"{subject.name}: {words}", subject.method, options)


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{key} {_said(part)}" for key, part in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)
