"""The report on a finished work directory: `write(workdir)` or `python -m spqr_jax.report WORKDIR`.

It reads leaderboard.json, manifest.json and the cells' records and pictures; it needs no model, no accelerator, no JAX.
"""

from spqr_jax.report.html import write

__all__ = ["write"]
