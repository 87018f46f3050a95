"""Small bundles that stand in one table: as `tests.submission.invented` makes them, with the same reference images."""

from pathlib import Path

import numpy as np

from spqr_jax.board.submissions import DRAWS
from spqr_jax.config import Config
from spqr_jax.files import storage
from spqr_jax.files.layout import Workdir
from spqr_jax.score import leaderboard
from spqr_jax.submission import bundle as bundle_lib
from spqr_jax.submission import pack
from tests.submission import invented


def run(workdir: Path, made: Config, *, draw: int, reference: int = 0, error: float = 0.0) -> Path:
    """A finished run. reference: seed of its reference features. error: of their last digits, as machines differ."""
    invented.run(workdir, made, draw=draw)
    path = Workdir(workdir).reference_features
    features = np.random.default_rng(reference).normal(0.0, 1.0, (64, invented.WIDTH)) * (1.0 + error)
    storage.write_npz(path, features=features.astype(np.float32), identity=storage.read_npz(path)["identity"])
    board = leaderboard.build(workdir, section=vars(made.score), replicates=made.score.replicates)
    leaderboard.write(workdir, board)
    return workdir


def bundle(folder: Path, name: str, subjects: tuple[str, ...], *, draw: int, config=None, **options) -> Path:
    """The bundle `folder`/bundles/`name` of a run in `folder`/runs/`name`. config: further arguments of its config."""
    made = invented.config(subjects=subjects, **(config or {}))
    made.score.replicates = DRAWS.replicates
    workdir = run(folder / "runs" / name, made, draw=draw, **options)
    return bundle_lib.write(pack.of_run(workdir), folder / "bundles" / name)
