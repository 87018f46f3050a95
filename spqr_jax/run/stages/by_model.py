"""Work on models that are there: each is opened once for all that is done with it, such as its attacks and probes."""

import functools
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import TypeVar

import numpy as np

from spqr_jax.devices import processes
from spqr_jax.pipeline import Pipeline
from spqr_jax.run.attempts import Attempt
from spqr_jax.run.cells import Model
from spqr_jax.run.probes import Probing
from spqr_jax.run.stages.align import load_subject
from spqr_jax.run.stages.background import Background
from spqr_jax.run.stages.finetune import adapted_pipeline
from spqr_jax.run.stages.state import Failure, Run, each

Work = TypeVar("Work", bound=Attempt | Probing)
Open = Callable[[], Pipeline]


def each_by_model(
    run: Run, items: Iterable[Work], work: Callable[[Work, Open], None], background: Background, stage: str
) -> list[Failure]:
    """Do `work` for every item that is not complete, and have its images judged while the next ones are drawn.

    work: takes the item and what opens its model. Models of cells that are not fine-tuned yet are left out.
    """
    items, failures = list(items), list[Failure]()
    todo = processes.agreed(np.array([not item.done and item.model.there for item in items], bool))
    wanted = [item for item, yes in zip(items, todo, strict=True) if yes]
    for model, group in groupby(wanted, lambda item: item.model):
        opened = functools.cache(functools.partial(_opened, run, model))

        def one(item: Work, opened: Open = opened) -> None:
            work(item, opened)
            background.submit(item)

        failures += each(group, lambda item: item.label, one, stage)
    return failures


def _opened(run: Run, model: Model) -> Pipeline:
    return load_subject(run, model.subject) if model.cell is None else adapted_pipeline(run, model.cell)
