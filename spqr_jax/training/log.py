"""What a fine-tuning reports as it goes: one JSON line a step, and TensorBoard's files where tensorboardX is there."""

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from spqr_jax.files import storage


class Progress(NamedTuple):
    """A step of a fine-tuning: its number from 1, mean squared error, norm of the gradient before clipping, rate."""

    step: int
    loss: float
    grad_norm: float
    lr: float


class TrainingLog:
    """Callable for `finetune(on_step=...)`; a context manager.

    Writes `<directory>/steps.jsonl` with step, loss, grad_norm, lr and samples_per_s (of the time since the line
    before), appending when a run continues; a step that is repeated after a stop has its line twice, the later holds.
    On an object store the lines are written at the end, also of a run that is asked to stop (a killed one loses its
    own; weights and states do not depend on them), and there are no files for TensorBoard: the lines hold the same.
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
        from tensorboardX import SummaryWriter
    except ModuleNotFoundError:  # the extra [tensorboard] is not installed
        return None
    return SummaryWriter(str(directory), write_to_disk=True)
