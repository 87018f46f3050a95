"""Judging while generation goes on: one worker thread, a bounded queue, the judge stage's own functions."""

import queue
import threading
from types import TracebackType

from absl import logging

from spqr_jax.devices import preemption
from spqr_jax.run.cells import Cell, SubjectDir
from spqr_jax.run.stages import judge
from spqr_jax.run.stages.state import Run

# Finished phases that may wait: with more, generation waits for the judges instead of running far ahead of them.
WAITING = 2


class Background:
    """Judges what is submitted, in order; a context manager that waits for the rest at its end.

    What fails here is only logged: the judge stage finds it undone, tries again and reports. ONNX Runtime lets go of
    the interpreter while it computes, so the thread costs generation nothing but the cores that the judges use. It must
    leave JAX's devices alone: they are busy, and on a CPU of several devices XLA may wait for ever for its turn.
    """

    def __init__(self, run: Run, *, enabled: bool):
        self._run = run
        self._queue: queue.Queue[SubjectDir | Cell | None] = queue.Queue(maxsize=WAITING)
        self._worker = threading.Thread(target=self._work, name="judges", daemon=True) if enabled else None

    def submit(self, item: SubjectDir | Cell) -> None:
        """A subject or cell whose pictures are all on disk."""
        if self._worker is not None and judge.shared_out(self._run, [item]):
            self._queue.put(item)

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            if preemption.asked_here():
                continue  # left to the next run
            try:
                judge.judge_one(self._run, item)
            except (Exception, SystemExit) as error:
                logging.debug("judging in the background: %s", error, exc_info=True)

    def __enter__(self) -> "Background":
        if self._worker is not None:
            self._worker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._worker is None:
            return
        if kind is not None:  # stopping: what waits is left to the next run, what is being judged is finished
            while not self._queue.empty():
                self._queue.get_nowait()
        self._queue.put(None)
        self._worker.join()
