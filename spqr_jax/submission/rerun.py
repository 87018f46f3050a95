"""The second level of verification: a share of a submission's images made again from the weights, and judged again.

It is a run of its own with the submission's config, on a part of its prompts, and needs what the config names: weights,
data, prompts and judges. Ids of cells are hashes of these, so other files are found before the first image. Alignment
and fine-tuning are done again in full: a share saves images, and subjects save the rest.
"""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from spqr_jax import methods
from spqr_jax.config import Config
from spqr_jax.files import records
from spqr_jax.files.records import ROLES
from spqr_jax.run import opening, stages
from spqr_jax.run.stages import Run
from spqr_jax.submission.bundle import Bundle
from spqr_jax.submission.images import FLIPS
from spqr_jax.submission.places import shown
from spqr_jax.submission.stated import config_of

STAGES = {"align", "generate", "finetune", "judge"}
KEY = ("phase", "role", "prompt_set", "prompt_id", "k")


class Rerun(NamedTuple):
    """The outcome.

    Attributes:
        images: how many were made again.
        flips: those with another verdict, a line each.
        faults: everything that is wrong; empty if the images are those of the submission.
    """

    images: int
    flips: list[str]
    faults: list[str]


class Asked(NamedTuple):
    """What to make again.

    Attributes:
        share: of the prompts of each role, above 0 and at most 1; at least one prompt is taken.
        seed: of their draw.
        subjects: names of the subjects; None: all.
        changes: field of the config -> another value, for paths that differ on this machine.
        allowed: methods of other packages that may be imported.
        flips: share of the images whose verdict may differ.
    """

    share: float
    seed: int = 0
    subjects: Sequence[str] | None = None
    changes: Mapping[str, str] = {}
    allowed: Sequence[str] = ()
    flips: float = FLIPS


def check(bundle: Bundle, workdir: Path, asked: Asked) -> Rerun:
    """Make a share of the images of a verified submission again in `workdir`, and compare the verdicts.

    Raises ValueError for a share outside (0, 1], a field that a config does not have, and a method of another package
    that is not allowed; and as `opening.open_run` for what the config names and is not there.
    """
    if not 0.0 < asked.share <= 1.0:
        raise ValueError(f"--rerun {asked.share}: expected a share above 0 and at most 1.")
    config = changed(config_of(bundle.manifest), asked.changes)
    for subject in config.subjects:
        if not subject.checkpoint and subject.method not in (*methods.METHODS, *asked.allowed):
            raise ValueError(f"method {shown(subject.method)} is code of another package: allow it with --allow.")
    run = opening.only(opening.open_run(config, workdir), asked.subjects)
    there = {cell.name for cell in bundle.cells}
    if other := [cell.id for cell in run.cells if cell.id not in there]:
        return Rerun(0, [], [f"cells/{other[0]}: is missing; the files at hand give this id, so they are others"])
    run = run._replace(prompts=drawn(run, asked.share, asked.seed))
    failures = stages.carry_out(run, STAGES)
    if failures:
        return Rerun(0, [], [f"{failure.what}: {failure.error}" for failure in failures])
    return _compared(bundle, run, asked.flips)


def changed(config: Config, changes: Mapping[str, str]) -> Config:
    """The config with other values in some text fields: {"base": "models/sd15"}.

    Raises ValueError for a field that the config does not have, or that holds no text.
    """
    for field, value in changes.items():
        holder: Any = config
        *path, last = field.split(".")
        for part in path:
            holder = holder.get(part) if isinstance(holder, dict) else getattr(holder, part, None)
        old = holder.get(last) if isinstance(holder, dict) else getattr(holder, last, None)
        if not isinstance(old, str):
            raise ValueError(f"--set {field}: the config has no such field with a text.")
        if isinstance(holder, dict):
            holder[last] = value
        else:
            setattr(holder, last, value)
    return config


def drawn(run: Run, share: float, seed: int) -> dict[str, list[Any]]:
    """A random share of the prompts of each role, in their order; at least one."""
    rng = random.Random(seed)
    return {
        role: [run.prompts[role][i] for i in sorted(rng.sample(range(n), max(1, round(share * n))))]
        for role in ROLES
        for n in [len(run.prompts[role])]
    }


def _compared(bundle: Bundle, run: Run, allowed: float) -> Rerun:
    stated = {cell.name: {_key(row): row for row in cell.records.to_pylist()} for cell in bundle.cells}
    n, flips = 0, []
    for cell in run.cells:
        for row in records.read(cell.folder.records):
            n += 1
            theirs = stated[cell.id][_key(row)]["verdict"]
            if row["verdict"] != theirs:
                where = f"{row['phase']} {row['role']} prompt {shown(row['prompt_id'])}, image {row['k']}"
                flips.append(f"cells/{cell.id}: {where}: {row['verdict']} here, {theirs} in the submission")
    faults = []
    if len(flips) > allowed * n:
        faults = [f"{len(flips)} of {n} verdicts differ, more than the share of {allowed} that may", *flips]
    return Rerun(n, flips, faults)


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


def text(found: Rerun) -> str:
    """The outcome of a rerun without faults, as the command prints it."""
    return "\n".join([f"made again: {found.images} images, {len(found.flips)} with another verdict", *found.flips])
