"""The unit of work: a cell is one subject fine-tuned under one profile on one scenario with one seed."""

from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from spqr_jax import protocols
from spqr_jax.config import Config, Subject
from spqr_jax.files.layout import CellFolder, SubjectFolder, WeightsFolder, Workdir
from spqr_jax.run import identity
from spqr_jax.run.identity import Inputs


class SubjectDir(NamedTuple):
    """A subject and the places of what its cells share: aligned weights, and the images before fine-tuning."""

    settings: Subject  # as the config has it
    id: str
    weights: WeightsFolder
    folder: SubjectFolder

    @property
    def name(self) -> str:
        return self.settings.name

    @property
    def is_control(self) -> bool:
        """Whether this is the backbone itself, made safe by nobody."""
        return self.settings.method == "none" and not self.settings.checkpoint


class Cell(NamedTuple):
    """One cell that a config asks for, and its place in the work directory."""

    subject: SubjectDir
    profile: str
    scenario: str
    seed: int
    id: str
    folder: CellFolder

    @property
    def done(self) -> bool:
        return self.folder.summary.exists()

    @property
    def label(self) -> str:
        return label(self.subject.name, self.scenario, self.profile, self.seed)


class Model(NamedTuple):
    """A model that attacks and probes look at: a subject before fine-tuning, or what one of its cells made of it."""

    subject: SubjectDir
    cell: Cell | None = None

    @property
    def id(self) -> str:
        """Of the subject or of the cell."""
        return self.subject.id if self.cell is None else self.cell.id

    @property
    def phase(self) -> str:
        """`before` or `after` fine-tuning."""
        return "before" if self.cell is None else "after"

    @property
    def there(self) -> bool:
        """Whether it can be had without fine-tuning anything first."""
        cell = self.cell  # nothing is trained with adapters of a file
        return cell is None or cell.done or cell.folder.adapted.is_dir() or bool(protocols.adapter_of(cell.profile))

    @property
    def label(self) -> str:
        """The model in messages."""
        return self.subject.name if self.cell is None else self.cell.label

    @property
    def columns(self) -> dict[str, Any]:
        """The columns of records that say which model it is. Before fine-tuning they are empty."""
        if self.cell is None:
            return {"cell": "", "profile": "", "scenario": "", "seed": 0}
        return {name: getattr(self.cell, name) for name in ("profile", "scenario", "seed")} | {"cell": self.cell.id}


def models(subjects: list[SubjectDir], cells: list[Cell]) -> list[Model]:
    """Every model of a run: each subject, then what each cell makes of its own."""
    return [*(Model(subject) for subject in subjects), *(Model(cell.subject, cell) for cell in cells)]


def label(subject: str, scenario: str, profile: str, seed: int) -> str:
    """A cell in messages."""
    return f"{subject} x {profile} x {scenario} x seed {seed}"


def plan(config: Config, workdir: Path, inputs: Inputs) -> tuple[list[SubjectDir], list[Cell]]:
    """Every subject and cell of a run, in the order of the config."""
    subjects = [_subject(config, subject, workdir, inputs) for subject in config.subjects]
    bft = config.bft
    cells = [
        _cell(config, subject, workdir, inputs, setting)
        for subject in subjects
        for setting in product(bft.scenarios, bft.profiles, bft.seeds)
    ]
    return subjects, cells


def _subject(config: Config, subject: Subject, workdir: Path, inputs: Inputs) -> SubjectDir:
    weights = identity.weights_id(config, subject, inputs)
    name = f"{slug(subject.name)}-{identity.images_id(config, weights, inputs)}"
    return SubjectDir(subject, name, Workdir(workdir).weights(weights), Workdir(workdir).subject(name))


def _cell(config: Config, subject: SubjectDir, workdir: Path, inputs: Inputs, setting: tuple[str, str, int]) -> Cell:
    scenario, profile, seed = setting
    data = inputs.adaptations.get(profile, inputs.data[scenario])
    number = identity.cell_id(config, subject.id, data, profile, scenario, seed)
    name = f"{slug(subject.name)}-{slug(profile)}-{slug(scenario)}-{seed}-{number}"
    return Cell(subject, profile, scenario, seed, name, Workdir(workdir).cell(name))


def slug(name: str) -> str:
    """A name as a part of a directory's name."""
    return "".join(c if c.isalnum() or c in "_" else "-" for c in name.lower())[:40]
