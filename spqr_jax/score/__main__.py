"""Compute a leaderboard again from the records of its run: `python -m spqr_jax.score WORKDIR`."""

import sys

from spqr_jax.score.leaderboard import main

sys.exit(main())
