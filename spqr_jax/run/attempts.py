"""The unit of work of attacks: an attempt is one attack on one model, a subject or what a cell made of it."""

from pathlib import Path
from typing import NamedTuple

from spqr_jax.config import Attack, Config
from spqr_jax.files.layout import AttackFolder, Workdir
from spqr_jax.run import identity, names
from spqr_jax.run.cells import Cell, SubjectDir, slug
from spqr_jax.run.identity import Inputs


class Attempt(NamedTuple):
    """One attack that a config asks for on one model, and its place in the work directory.

    Attributes:
        settings: as the config has it.
        subject: the subject that is attacked.
        cell: the cell whose model is attacked, after fine-tuning; None: the subject before it.
        id: of the attempt, by which its folder is named.
        folder: its records and images.
        source: where the attack's finds are kept: in `folder`, or for all models if it is transferred.
    """

    settings: Attack
    subject: SubjectDir
    cell: Cell | None
    id: str
    folder: AttackFolder
    source: AttackFolder

    @property
    def phase(self) -> str:
        """`before` or `after` fine-tuning."""
        return "before" if self.cell is None else "after"

    @property
    def done(self) -> bool:
        return self.folder.summary.exists()

    @property
    def label(self) -> str:
        """The attempt in messages."""
        return f"{self.settings.name} on {self.subject.name if self.cell is None else self.cell.label}"


def plan(config: Config, workdir: Path, inputs: Inputs, subjects: list[SubjectDir], cells: list[Cell]) -> list[Attempt]:
    """Every attempt of a run: all attacks on each subject before fine-tuning, then on each cell's model after it."""
    models: list[tuple[SubjectDir, Cell | None]] = [(subject, None) for subject in subjects]
    models += [(cell.subject, cell) for cell in cells]
    return [
        _attempt(config, Workdir(workdir), inputs, settings, subject, cell)
        for subject, cell in models
        for settings in config.attacks
    ]


def _attempt(
    config: Config, workdir: Workdir, inputs: Inputs, settings: Attack, subject: SubjectDir, cell: Cell | None
) -> Attempt:
    phase, model = ("before", subject.id) if cell is None else ("after", cell.id)
    name = slug(settings.name)
    id = f"{name}-{slug(subject.name)}-{phase}-{identity.attack_id(config, settings, model)}"
    source = id
    if settings.transfer:
        source = f"{name}-unaligned-{identity.attack_id(config, settings, identity.unaligned_id(config, inputs))}"
    return Attempt(settings, subject, cell, id, workdir.attack(id), workdir.attack(source))


def prompt_set(config: Config, settings: Attack) -> str:
    """The name of the attacked prompts in records: "mini:harmful@P4D"."""
    return f"{names.prompt_set(config, 'harmful')}@{settings.name}"


def n_prompts(config: Config, settings: Attack) -> int:
    """The number of harmful prompts that are attacked: the first ones of the run."""
    return settings.prompts or config.prompts.n_harmful
