"""Judging while generation goes on: one worker thread and a bounded queue."""

import queue
import threading
from collections.abc import Callable
from types import TracebackType

from absl import logging

from spqr_jax.devices import preemption
from spqr_jax.run.attempts import Attempt
from spqr_jax.run.cells import Cell, SubjectDir
from spqr_jax.run.probes import Probing

# Finished phases that may wait: with more, generation waits for the judges instead of running far ahead of them.
WAITING = 2

Item = SubjectDir | Cell | Attempt | Probing


class Background:
    """Judges the items that are submitted, in order; a context manager that waits for the rest at its end.

    work: judges one item; None: nothing is judged in the background.

    An item that fails here is only logged: the judge stage finds it undone, tries again and reports. ONNX Runtime lets
    go of the interpreter while it computes, so the thread costs generation nothing but the cores that the judges use.
    The thread must leave JAX's devices alone: they are busy, and on a CPU of several devices XLA may wait for ever for
    its turn.
    """

    def __init__(self, work: Callable[[Item], None] | None):
        self._queue: queue.Queue[Item | None] = queue.Queue(maxsize=WAITING)
        self._worker = work and threading.Thread(target=self._run, args=(work,), name="judges", daemon=True)

    def submit(self, item: Item) -> None:
        """A subject, cell, attempt or probe whose images are all on disk."""
        if self._worker is not None:
            self._queue.put(item)

    def finish(self) -> None:
        """Wait until every item is judged. Items submitted later are left to the judge stage."""
        if self._worker is not None:
            self._queue.put(None)
            self._worker.join()
            self._worker = None

    def _run(self, work: Callable[[Item], None]) -> None:
        while (item := self._queue.get()) is not None:
            if preemption.asked_here():
                continue  # left to the next run
            try:
                work(item)
            except (Exception, SystemExit) as error:
                logging.debug("judging in the background: %s", error, exc_info=True)

    def __enter__(self) -> "Background":
        if self._worker is not None:
            self._worker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:  # stopping: items that wait are left to the next run, the one in work is finished
            while not self._queue.empty():
                self._queue.get_nowait()
        self.finish()
