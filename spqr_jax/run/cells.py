"""The unit of work: a cell is one subject fine-tuned under one profile on one scenario with one seed.

Ids are hashes of everything that determines a result and of nothing else, so the same command run again finds what is
done, and a changed setting never reuses a stale picture.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from spqr_jax import config as config_lib
from spqr_jax.config import Config, Subject


class SubjectDir(NamedTuple):
    """What is shared by the cells of a subject: aligned weights and the pictures before fine-tuning."""

    subject: Subject
    id: str
    weights: Path
    root: Path


class Cell(NamedTuple):
    """One cell and where it lives."""

    subject: SubjectDir
    profile: str
    scenario: str
    seed: int
    id: str
    root: Path

    @property
    def done(self) -> bool:
        return (self.root / "cell.json").exists()

    @property
    def label(self) -> str:
        return f"{self.subject.subject.name} x {self.profile} x {self.scenario} x seed {self.seed}"


def digest(*values: Any) -> str:
    """Twelve hex digits over JSON-able values."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class Inputs(NamedTuple):
    """What the files a config names hold, so that an id changes with a file's content and not with its path.

    Attributes:
        backbone: sha256 of the backbone's files.
        prompts: role -> hash of the chosen rows.
        data: scenario -> the data set's name, which identifies its content.
        checkpoints: path in the config -> sha256.
        pictures: data source in a method's options -> hash of its content.
    """

    backbone: str
    prompts: dict[str, str]
    data: dict[str, str]
    checkpoints: dict[str, str]
    pictures: Mapping[str, str] = {}


# Fields of config.bft that name cells, or say how a step is computed and not what.
NOT_HASHED = ("profiles", "scenarios", "seeds", "data", "steps", "epochs", "checkpoint_every", "accumulate", "remat")


def plan(config: Config, workdir: Path, inputs: Inputs) -> tuple[list[SubjectDir], list[Cell]]:
    """Every subject and cell of a run, in the order of the config."""
    plain = config_lib.as_dict(config)
    plain["generation"].pop("batch_size")
    subjects, cells = [], []
    for subject in config.subjects:
        made = digest(inputs.backbone, plain["dtype"], _without_name(subject, inputs), plain["concept"], plain["seed"])
        shown = digest(made, inputs.prompts, config.prompts.images, plain["generation"])
        name = _slug(subject.name)
        directory = SubjectDir(
            subject, f"{name}-{shown}", workdir / "pipelines" / made, workdir / "subjects" / f"{name}-{shown}"
        )
        subjects.append(directory)
        for scenario in config.bft.scenarios:
            for profile in config.bft.profiles:
                for seed in config.bft.seeds:
                    cells.append(
                        _cell(directory, plain["bft"], inputs.data[scenario], profile, scenario, seed, workdir)
                    )
    return subjects, cells


def _cell(
    subject: SubjectDir, bft: dict[str, Any], data: str, profile: str, scenario: str, seed: int, workdir: Path
) -> Cell:
    ours = {k: v for k, v in bft.items() if k not in NOT_HASHED}
    what = (ours, data, bft["steps"][profile], bft["epochs"][profile], profile, scenario, seed)
    name = f"{_slug(subject.subject.name)}-{profile}-{_slug(scenario)}-{seed}-{digest(subject.id, what)}"
    return Cell(subject, profile, scenario, seed, name, workdir / "cells" / name)


def _without_name(subject: Subject, inputs: Inputs) -> dict[str, Any]:
    checkpoint = inputs.checkpoints[subject.checkpoint] if subject.checkpoint else ""
    options = {k: inputs.pictures.get(v, v) if isinstance(v, str) else v for k, v in subject.options.items()}
    return {"method": subject.method, "options": options, "checkpoint": checkpoint}


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "_" else "-" for c in name.lower())[:40]
