"""Ids of results: hashes of everything that determines a result, and of nothing else.

So the same command run again finds the work that is done, and a changed setting never meets an old image.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from spqr_jax.config import Config, Subject

# Fields of config.bft that are part of a cell's name, or that change how a step is computed and not its result.
NOT_HASHED = ("profiles", "scenarios", "seeds", "data", "steps", "epochs", "checkpoint_every", "accumulate", "remat")


class Inputs(NamedTuple):
    """The content of the files that a config names, so that an id changes with the content and not with the path.

    Attributes:
        backbone: sha256 of the backbone's files.
        prompts: role -> hash of the chosen rows.
        data: scenario -> the data set's name, which identifies its content.
        checkpoints: path in the config -> sha256.
        pictures: data source in a method's options -> hash of its images and captions.
    """

    backbone: str
    prompts: dict[str, str]
    data: dict[str, str]
    checkpoints: dict[str, str]
    pictures: Mapping[str, str] = {}


def digest(*values: Any) -> str:
    """Twelve hex digits over JSON-able values."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def weights_id(config: Config, subject: Subject, inputs: Inputs) -> str:
    """Id of a subject's aligned weights. The subject's name is no part of it."""
    checkpoint = inputs.checkpoints[subject.checkpoint] if subject.checkpoint else ""
    options = {k: inputs.pictures.get(v, v) if isinstance(v, str) else v for k, v in subject.options.items()}
    made = {"method": subject.method, "options": options, "checkpoint": checkpoint}
    return digest(inputs.backbone, config.dtype, made, config.concept, config.seed)


def images_id(config: Config, weights: str, inputs: Inputs) -> str:
    """Id of the images that the weights with this id make before fine-tuning."""
    sampling = dataclasses.asdict(config.generation)
    sampling.pop("batch_size")
    return digest(weights, inputs.prompts, config.prompts.images, sampling)


def cell_id(config: Config, subject_id: str, data: str, profile: str, scenario: str, seed: int) -> str:
    """Id of one fine-tuning of a subject and of its results. data: the name of the scenario's data set."""
    bft = dataclasses.asdict(config.bft)
    shared = {name: value for name, value in bft.items() if name not in NOT_HASHED}
    tuning = (shared, data, bft["steps"][profile], bft["epochs"][profile], profile, scenario, seed)
    return digest(subject_id, tuning)
