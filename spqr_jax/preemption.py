"""Stopping in order: on SIGTERM the current step ends, its state is saved, and the process exits with 143.

Schedulers of shared clusters send SIGTERM some seconds before they take a machine away, and requeue what exits so.
"""

import signal
import threading
from types import FrameType

EXIT_STATUS = 128 + signal.SIGTERM

_asked = threading.Event()


def listen() -> None:
    """Note SIGTERM instead of dying of it. A second one ends the process at once."""

    def note(signum: int, frame: FrameType | None) -> None:
        del signum, frame
        _asked.set()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, note)


def asked() -> bool:
    """Whether this process was asked to stop."""
    return _asked.is_set()


def exit_if_asked() -> None:
    """Call between units of work, when everything finished is on disk. Raises SystemExit."""
    if asked():
        raise SystemExit(EXIT_STATUS)
