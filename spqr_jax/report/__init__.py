"""Reports: a page, tables, figures and comparisons of finished runs.

`write(workdir)` or `python -m spqr_jax.report WORKDIR` makes them from leaderboard.json, manifest.json, and the records
and images of the cells. This room may know scores and files. It knows no model and no JAX, and needs no accelerator.
"""

from spqr_jax.report.html import write

__all__ = ["write"]
