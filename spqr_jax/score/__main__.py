"""Compute a leaderboard again from the records of its run: `python -m spqr_jax.score WORKDIR`."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from spqr_jax.files import storage
from spqr_jax.files.layout import Workdir
from spqr_jax.score import attacks, leaderboard
from spqr_jax.score.text import table


def main(arguments: list[str] | None = None) -> int:
    """The command: write the leaderboard of a work directory, print it, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m spqr_jax.score", description="Recompute a leaderboard.")
    parser.add_argument("workdir", help="local, or gs://bucket/folder")
    parser.add_argument(
        "--fid_bounds", type=float, nargs=2, metavar=("MIN", "MAX"), help="default: those of the config"
    )
    parser.add_argument("--replicates", type=int, default=leaderboard.REPLICATES)
    parser.add_argument("--seed", type=int, default=leaderboard.SEED)
    flags = parser.parse_args(arguments)
    try:
        section = configured(storage.directory(flags.workdir))
        board = leaderboard.build(
            flags.workdir,
            section=section,
            fid_bounds=flags.fid_bounds,
            replicates=flags.replicates,
            seed=flags.seed,
        )
        attacked = attacks.build(flags.workdir, replicates=flags.replicates, seed=flags.seed)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    leaderboard.write(flags.workdir, board)
    print(table(board), end="")
    if attacked is not None:
        attacks.write(flags.workdir, attacked)
        print(attacks.text(attacked), end="")
    return 0


def configured(workdir: Path) -> dict[str, Any]:
    """The section `score` of the run's config, which its manifest holds; empty without a manifest."""
    path = Workdir(workdir).manifest
    config = json.loads(path.read_text(encoding="utf-8")).get("config", {}) if path.exists() else {}
    return dict(config.get("score") or {})


if __name__ == "__main__":
    sys.exit(main())
