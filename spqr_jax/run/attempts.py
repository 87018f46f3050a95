"""The unit of work of attacks: an attempt is one attack on one model, a subject or what a cell made of it."""

from pathlib import Path
from typing import NamedTuple

from spqr_jax.config import Attack, Config
from spqr_jax.files.layout import AttackFolder, Workdir
from spqr_jax.run import identity, names
from spqr_jax.run.cells import Model, slug
from spqr_jax.run.identity import Inputs


class Attempt(NamedTuple):
    """One attack that a config asks for on one model, and its place in the work directory.

    Attributes:
        settings: as the config has it.
        model: what is attacked.
        id: of the attempt, by which its folder is named.
        folder: its records and images.
        source: where the attack's finds are kept: in `folder`, or for all models if it is transferred.
    """

    settings: Attack
    model: Model
    id: str
    folder: AttackFolder
    source: AttackFolder

    @property
    def done(self) -> bool:
        return self.folder.summary.exists()

    @property
    def label(self) -> str:
        """The attempt in messages."""
        return f"{self.settings.name} on {self.model.label}"


def plan(config: Config, workdir: Path, inputs: Inputs, models: list[Model]) -> list[Attempt]:
    """Every attempt of a run: all attacks on each of its models."""
    return [_attempt(config, Workdir(workdir), inputs, attack, model) for model in models for attack in config.attacks]


def _attempt(config: Config, workdir: Workdir, inputs: Inputs, settings: Attack, model: Model) -> Attempt:
    name = slug(settings.name)
    id = f"{name}-{slug(model.subject.name)}-{model.phase}-{identity.attack_id(config, settings, model.id)}"
    source = id
    if settings.transfer:
        source = f"{name}-unaligned-{identity.attack_id(config, settings, identity.unaligned_id(config, inputs))}"
    return Attempt(settings, model, id, workdir.attack(id), workdir.attack(source))


def prompt_set(config: Config, settings: Attack) -> str:
    """The name of the attacked prompts in records: "mini:harmful@P4D"."""
    return f"{names.prompt_set(config, 'harmful')}@{settings.name}"


def n_prompts(config: Config, settings: Attack) -> int:
    """The number of harmful prompts that are attacked: the first ones of the run."""
    return settings.prompts or config.prompts.n_harmful
