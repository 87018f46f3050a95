"""A stop on SIGTERM: the current step ends, its state is saved, and the process exits with status 143.

Schedulers of shared clusters send SIGTERM some seconds before they take a machine away. They queue a job with this exit
status again.
"""

import itertools
import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils

EXIT_STATUS = 128 + signal.SIGTERM

requested = threading.Event()
_sync_points = itertools.count()


def listen() -> None:
    """From now on, note SIGTERM instead of ending the process. A second SIGTERM ends it at once.

    With several processes JAX's own service listens for SIGTERM, so that all of them stop after the same step.
    """
    if jax.process_count() > 1:
        return

    def note(signum: int, frame: FrameType | None) -> None:
        del signum, frame
        requested.set()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, note)


def asked() -> bool:
    """Whether the run was asked to stop. All processes must call this equally often, and all get the same answer."""
    if jax.process_count() > 1:
        return multihost_utils.reached_preemption_sync_point(next(_sync_points))
    return requested.is_set()


def asked_here() -> bool:
    """Whether this process was asked to stop, for work that each process does alone. False if JAX's service listens."""
    return requested.is_set()


def exit_if_asked() -> None:
    """Raise SystemExit if the run was `asked` to stop. Call it when all finished work is on disk."""
    if asked():
        raise SystemExit(EXIT_STATUS)


def exit_if_asked_here() -> None:
    """As `exit_if_asked`, for work that each process does alone."""
    if asked_here():
        raise SystemExit(EXIT_STATUS)
