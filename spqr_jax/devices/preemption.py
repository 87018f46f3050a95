"""Stopping in order: on SIGTERM the current step ends, its state is saved, and the process exits with 143.

Schedulers of shared clusters send SIGTERM some seconds before they take a machine away, and requeue jobs that exit so.
"""

import itertools
import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils

EXIT_STATUS = 128 + signal.SIGTERM

_asked = threading.Event()
_sync_points = itertools.count()


def listen() -> None:
    """Note SIGTERM instead of dying of it. A second one ends the process at once.

    Among several processes JAX's own service listens, so that all stop after the same step.
    """
    if jax.process_count() > 1:
        return

    def note(signum: int, frame: FrameType | None) -> None:
        del signum, frame
        _asked.set()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, note)


def asked() -> bool:
    """Whether to stop. Several processes must call this equally often, and all get the same answer."""
    if jax.process_count() > 1:
        return multihost_utils.reached_preemption_sync_point(next(_sync_points))
    return _asked.is_set()


def asked_here() -> bool:
    """Whether this process was asked, for work that processes do apart; False where JAX's service listens."""
    return _asked.is_set()


def exit_if_asked() -> None:
    """Call between units of work, when everything finished is on disk; see `asked`. Raises SystemExit."""
    if asked():
        raise SystemExit(EXIT_STATUS)


def exit_if_asked_here() -> None:
    """As `exit_if_asked`, between units of work that processes do apart."""
    if asked_here():
        raise SystemExit(EXIT_STATUS)
