"""Recompute a leaderboard from its records: `python -m spqr_jax.score WORKDIR`."""

import sys

from spqr_jax.score.leaderboard import main

sys.exit(main())
