"""Disk and host memory of a whole config, by arithmetic on shapes: number x bytes, each a bound from above."""

from typing import Any, NamedTuple

import jax
import numpy as np

from spqr_jax import params as params_lib
from spqr_jax.fit import programs, work
from spqr_jax.fit.programs import Plan

FLOAT32 = 4


class Item(NamedTuple):
    """What lies there, how often, and the bytes of one."""

    what: str
    number: int
    bytes: int


def needed(plan: Plan) -> dict[str, Any]:
    """{"disk", "host"}, each {"bytes", "items", "left_out"}; an item is {"what", "number", "bytes"} of one."""
    trained = {
        profile: params_lib.nbytes(programs.step(plan, profile).trainable) for profile in programs.trained(plan.config)
    }
    return {
        "disk": _sum(
            _disk(plan, trained), "judges and their caches, records, logs, compiled programs, the input files"
        ),
        "host": _sum(_host(plan, trained), "Python and the libraries, judges, images on their way to disk"),
    }


def _sum(items: list[Item], left_out: str) -> dict[str, Any]:
    total = sum(item.number * item.bytes for item in items)
    return {"bytes": total, "items": [item._asdict() for item in items], "left_out": left_out}


def _disk(plan: Plan, trained: dict[str, int]) -> list[Item]:
    """Everything that a run leaves in its work directory, and the state of the fine-tuning at work.

    trained: profile -> bytes of the parameters that it trains, in float32.
    """
    config, whole = plan.config, work.of(plan.config)
    height, width = programs.sampled_size(plan)
    aligned = sum(subject.method != "none" for subject in config.subjects)
    cells = len(config.subjects) * len(config.bft.scenarios) * len(config.bft.seeds)
    return [
        Item("image, as without compression", whole.pictures, height * width * 3),
        Item("mean and log-variance of an encoded image", whole.encoded, _latent(plan)),
        Item("weights of an aligned subject, if all changed", aligned, params_lib.nbytes(plan.pipeline.params)),
        *(Item(f"trained parameters of a cell, {profile}", cells, size) for profile, size in trained.items()),
        Item("state of the fine-tuning at work, two while it is replaced", 2, _state(plan, trained)),
    ]


def _host(plan: Plan, trained: dict[str, int]) -> list[Item]:
    """What may lie in the memory of a host at once, with all its devices on this host."""
    config = plan.config
    weights = params_lib.nbytes(plan.pipeline.params)
    exact = sum(leaf.size for leaf in jax.tree.leaves(plan.pipeline.params)) * FLOAT32
    return [
        Item(f"the backbone in {config.dtype}, and a subject", 2, weights),
        Item("the backbone in float32, while a method works, and its result", 2, exact),
        Item("mean and log-variance of a training image", config.bft.samples, _latent(plan)),
        Item("state of a fine-tuning on its way to disk", 1, _state(plan, trained)),
    ]


def _state(plan: Plan, trained: dict[str, int]) -> int:
    """Bytes of the largest state of a fine-tuning: parameters, Adam's two moments, and the average if there is one."""
    return (3 + bool(plan.config.bft.ema)) * max(trained.values(), default=0)


def _latent(plan: Plan) -> int:
    shape = plan.backbone.latent_shape(plan.pipeline, programs.training_size(plan))
    return 2 * int(np.prod(shape)) * FLOAT32
