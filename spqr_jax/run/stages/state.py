"""The things that stages share: the opened run, failures that do not stop the others, and times kept beside results."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import logging

from spqr_jax.config import Config
from spqr_jax.devices import preemption
from spqr_jax.files import storage
from spqr_jax.files.layout import Folder
from spqr_jax.pipeline import Pipeline
from spqr_jax.prompts import Prompt
from spqr_jax.run.attempts import Attempt
from spqr_jax.run.cells import Cell, SubjectDir
from spqr_jax.run.identity import Inputs
from spqr_jax.run.jury import Jury
from spqr_jax.run.probes import Probing

DISK_ERRORS = (28, 30, 122)  # no space, read-only, over quota: nothing else will succeed either


class Run(NamedTuple):
    """Everything opened and checked before the first long step."""

    config: Config
    workdir: Path
    backbone: Pipeline
    jury: Jury
    prompts: dict[str, list[Prompt]]  # role -> prompts
    inputs: Inputs
    subjects: list[SubjectDir]
    cells: list[Cell]
    attempts: Sequence[Attempt] = ()  # of the config's attacks
    probes: Sequence[Probing] = ()


class Unopened(NamedTuple):
    """A run of which nothing is opened: enough for the stages that read the work directory alone."""

    config: Config
    workdir: Path


class NothingToDo(Exception):
    """Raised by a stage that found nothing to work on, so that the stages after it have nothing either."""


class Failure(NamedTuple):
    """Something that did not finish, and why."""

    what: str
    error: str


def each(items: Iterable[Any], label: Callable[[Any], str], work: Callable[[Any], None], stage: str) -> list[Failure]:
    """Do `work` for every item. An item that fails is logged and listed, and the rest goes on.

    A full disk stops all. So does any failure among several processes, which cannot go on without each other.
    """
    failures = []
    for item in items:
        preemption.exit_if_asked_here()
        try:
            work(item)
        except OSError as error:
            if error.errno in DISK_ERRORS or jax.process_count() > 1:
                raise
            failures.append(Failure(f"{stage}: {label(item)}", str(error)))
        except Exception as error:
            logging.debug("traceback", exc_info=True)
            if jax.process_count() > 1:
                raise  # the other processes may be waiting for this one: all end, and the same command continues
            failures.append(Failure(f"{stage}: {label(item)}", f"{type(error).__name__}: {error}"))
        else:
            continue
        logging.error("%s failed: %s", *failures[-1])
    return failures


def note_seconds(folder: Folder, stage: str, seconds: float, count: int = 0) -> None:
    """Add to the time a stage took here: kept apart from results, which must not depend on it."""
    times = read_times(folder, stage)
    old = times.get(stage, {"seconds": 0.0, "count": 0})
    new = {stage: {"seconds": old["seconds"] + max(seconds, 0.0), "count": old["count"] + count}}
    storage.write_text(folder.times / f"{stage}.json", json.dumps(new, indent=2, sort_keys=True) + "\n")


def read_times(folder: Folder, stage: str = "*") -> dict[str, Any]:
    """stage -> {"seconds", "count"}; a file that cannot be read counts as no time at all."""
    times: dict[str, Any] = {}
    for path in sorted(folder.times.glob(f"{stage}.json")):
        try:
            times |= json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            logging.warning("%s is damaged; the time it held is lost.", path)
    return times
