"""The stages of a run, in order: align, generate, finetune, judge; then score and report.

Each stage does only what is missing on disk, so the same command continues after any stop. A subject or cell that fails
is reported and the others go on.
"""

from collections.abc import Sequence

from spqr_jax.run.stages.align import align
from spqr_jax.run.stages.background import Background
from spqr_jax.run.stages.finetune import finetune_cells
from spqr_jax.run.stages.generate import generate_before
from spqr_jax.run.stages.judge import judge
from spqr_jax.run.stages.state import Failure, Run

NAMES = ("align", "generate", "finetune", "judge", "score", "report")

__all__ = ["NAMES", "Failure", "Run", "carry_out", "chosen"]


def chosen(names: Sequence[str] | None) -> set[str]:
    """The stages named, all when None. Raises ValueError for a name that is none."""
    for name in names or ():
        if name not in NAMES:
            raise ValueError(f"--stages: {name!r} is unknown; expected some of {','.join(NAMES)}.")
    return set(names or NAMES)


def carry_out(run: Run, wanted: set[str]) -> list[Failure]:
    """The stages in `wanted` that make something; pictures are judged while the next ones are generated."""
    failures = []
    if "align" in wanted:
        failures += align(run)
    with Background(run, enabled="judge" in wanted and run.config.judges.overlap) as background:
        if "generate" in wanted:
            failures += generate_before(run, background)
        if "finetune" in wanted:
            failures += finetune_cells(run, background)
    if "judge" in wanted:
        failures += judge(run)
    return failures
