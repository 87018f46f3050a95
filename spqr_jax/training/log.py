"""The log of a fine-tuning: one JSON line for each step, and TensorBoard's files if tensorboardX is installed."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from spqr_jax.files import storage


class Progress(NamedTuple):
    """One step of a fine-tuning: number from 1, mean squared error, gradient norm before clipping, learning rate."""

    step: int
    loss: float
    grad_norm: float
    lr: float


class TrainingLog:
    """The function for `finetune(on_step=...)`; a context manager.

    It writes `<directory>/steps.jsonl` with step, loss, grad_norm, lr and samples_per_s, the speed since the line
    before. A continued run appends its lines. A step that is repeated after a stop has two lines, and the later one
    holds.

    On an object store the lines are written at the end, also if a run is asked to stop. A killed run loses its lines;
    weights and states do not depend on them. TensorBoard's files are not written there, since the lines hold the same.
    """

    def __init__(self, directory: Path, *, batch_size: int):
        directory.mkdir(parents=True, exist_ok=True)
        self._lines = storage.appending(directory / "steps.jsonl")
        self._board = None if storage.remote(directory) else _summary_writer(directory)
        self._batch_size, self._before = batch_size, time.perf_counter()

    def __call__(self, progress: Progress) -> None:
        now = time.perf_counter()
        values = progress._asdict() | {"samples_per_s": self._batch_size / max(now - self._before, 1e-9)}
        self._before = now
        self._lines.write(json.dumps(values) + "\n")
        self._lines.flush()
        if self._board:
            for name, value in values.items():
                if name != "step":
                    self._board.add_scalar(f"bft/{name}", value, progress.step)

    def __enter__(self) -> "TrainingLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lines.close()
        if self._board:
            self._board.close()


def _summary_writer(directory: Path) -> Any:
    try:
        with _torch_hidden():
            from tensorboardX import SummaryWriter
    except ModuleNotFoundError:  # the extra [tensorboard] is not installed
        return None
    return SummaryWriter(str(directory), write_to_disk=True)


@contextlib.contextmanager
def _torch_hidden() -> Iterator[None]:
    """An import of PyTorch fails in here, unless it is imported already.

    tensorboardX imports it where it is installed, which takes a second and 200 MB. Numbers need none of it.
    """
    hide = "torch" not in sys.modules
    if hide:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hide:
            del sys.modules["torch"]
