"""The unit of work of probes: one further prompt set on one model, a subject or what a cell made of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from spqr_jax.config import Config, Probe
from spqr_jax.files.layout import ProbeFolder, Workdir
from spqr_jax.prompts import Prompt
from spqr_jax.run import identity
from spqr_jax.run.cells import Model, slug
from spqr_jax.run.identity import Inputs


class Probing(NamedTuple):
    """One probe that a config asks for on one model, its prompts, and its place in the work directory."""

    settings: Probe  # as the config has it
    prompts: list[Prompt]
    model: Model
    id: str
    folder: ProbeFolder

    @property
    def done(self) -> bool:
        return self.folder.summary.exists()

    @property
    def label(self) -> str:
        """The probe and its model in messages."""
        return f"{self.settings.name} on {self.model.label}"


def plan(
    config: Config, workdir: Path, inputs: Inputs, models: list[Model], prompts: Mapping[str, list[Prompt]]
) -> list[Probing]:
    """Every probe of each model of a run. prompts: name of a probe -> its prompts."""
    found = []
    for model in models:
        for probe in config.probes:
            number = identity.probe_id(probe, inputs, model.id)
            id = f"{slug(probe.name)}-{slug(model.subject.name)}-{model.phase}-{number}"
            found.append(Probing(probe, prompts[probe.name], model, id, Workdir(workdir).probe(id)))
    return found
