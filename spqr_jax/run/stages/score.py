"""Stage score: the leaderboard, from the records of complete cells alone; beside it what attacks and probes found."""

import dataclasses

from spqr_jax.devices import processes
from spqr_jax.files.layout import Workdir
from spqr_jax.run.stages.background import Background
from spqr_jax.run.stages.state import Failure, NothingToDo, Run, Unopened
from spqr_jax.score import attacks, leaderboard, probes, text


def score(run: Run | Unopened, background: Background) -> list[Failure]:
    """Write and print the leaderboard of the work directory, and what its probes found and its attacks reached.

    Probes need no complete cell. Raises NothingToDo for the rest while there is none.
    """
    del background
    if not processes.first():
        return []
    if (found := probes.build(run.workdir, replicates=run.config.score.replicates)) is not None:
        probes.write(run.workdir, found)
        print(probes.text(found))
    if not Workdir(run.workdir).complete_cells():
        raise NothingToDo(f"no complete cell in {run.workdir}: nothing to score.")
    section = dataclasses.asdict(run.config.score)
    board = leaderboard.build(run.workdir, section=section, replicates=run.config.score.replicates)
    leaderboard.write(run.workdir, board)
    print(text.table(board))
    if (found := attacks.build(run.workdir, replicates=run.config.score.replicates)) is not None:
        attacks.write(run.workdir, found)
        print(attacks.text(found))
    return []
