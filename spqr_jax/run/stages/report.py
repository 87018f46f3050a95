"""Stage report: the page, tables and figures, from the leaderboard and the records."""

from spqr_jax.devices import processes
from spqr_jax.run.stages.background import Background
from spqr_jax.run.stages.state import Failure, Run, Unopened


def report(run: Run | Unopened, background: Background) -> list[Failure]:
    """Write the report of the work directory. Raises FileNotFoundError while there is no leaderboard."""
    from spqr_jax import report as report_lib  # here, because Matplotlib takes half a second to import

    del background
    if not processes.first():
        return []
    shown = run.config.report
    path = report_lib.write(
        run.workdir,
        tables=shown.tables or None,
        figures=shown.figures or None,
        prompts=shown.prompts,
        blur=shown.blur,
    )
    print(f"Report: {path}")
    return []
