"""The contract of methods, checked on a method in one step on a tiny random model of each backbone.

    python -m spqr_jax.methods check NAME      # for a method of the package, of a plug-in, or of your own

The project's own tests check its methods by the same code. Nothing here is used when a benchmark runs.
"""

from spqr_jax.methods.contract.checks import Finding, check, line
from spqr_jax.methods.contract.tiny import COMPONENTS

KEYS = tuple(COMPONENTS)  # of the backbones that methods are tried on

__all__ = ["KEYS", "Finding", "check", "line"]
