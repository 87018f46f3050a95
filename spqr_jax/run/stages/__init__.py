"""The stages of a run, in order: align, generate, finetune, attack, probe, judge, score, report.

Each stage does the work whose result is missing on disk, so the same command continues after any stop. A subject or
cell that fails is reported, and the others go on. Stages may use every room below `run`. Of `run` itself they use the
modules that name, identify and judge things; they know nothing of flags, opening or the manifest.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from absl import logging

from spqr_jax.run.stages import align, attack, finetune, generate, judge, probe, report, score
from spqr_jax.run.stages.background import Background
from spqr_jax.run.stages.state import Failure, NothingToDo, Run, Unopened

__all__ = ["NAMES", "STAGES", "Failure", "Run", "Stage", "Unopened", "carry_out", "chosen", "need_models"]


class Stage(NamedTuple):
    """One stage.

    work: takes the run and the judging in the background, and returns the failures.
    needs_models: False for a stage that reads the work directory alone, so that it can work on an `Unopened` run.
    """

    name: str
    work: Callable[[Any, Background], list[Failure]]
    needs_models: bool = True


STAGES = (
    Stage("align", align.align),
    Stage("generate", generate.generate),
    Stage("finetune", finetune.finetune),
    Stage("attack", attack.attack),
    Stage("probe", probe.probe),
    Stage("judge", judge.judge),
    Stage("score", score.score, needs_models=False),
    Stage("report", report.report, needs_models=False),
)
NAMES = tuple(stage.name for stage in STAGES)


def chosen(names: Sequence[str] | None) -> set[str]:
    """The stages named, all when None. Raises ValueError for an unknown name."""
    for name in names or ():
        if name not in NAMES:
            raise ValueError(f"--stages: {name!r} is unknown; expected some of {','.join(NAMES)}.")
    return set(names or NAMES)


def need_models(wanted: set[str]) -> bool:
    """Whether any of these stages works on models, so that the run must be opened."""
    return any(stage.needs_models for stage in STAGES if stage.name in wanted)


def carry_out(run: Run | Unopened, wanted: set[str]) -> list[Failure]:
    """Do the stages in `wanted`, in order. Images are judged in the background while the next ones are generated."""
    failures: list[Failure] = []
    judging = None
    if isinstance(run, Run) and "judge" in wanted and run.config.judges.overlap:
        judging = partial(judge.judge_own, run)
    with Background(judging) as background:
        for stage in STAGES:
            if stage.name in wanted:
                try:
                    failures += stage.work(run, background)
                except NothingToDo as reason:
                    logging.warning("%s", reason)
                    break
    return failures
