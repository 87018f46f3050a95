"""What a fine-tuning reports as it goes: one JSON line a step, and TensorBoard's files where tensorboardX is there."""

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from spqr_jax.finetune import Progress


class TrainingLog:
    """Callable for `finetune(on_step=...)`; a context manager.

    Writes `<directory>/steps.jsonl` with step, loss, grad_norm, lr and samples_per_s (of the time since the line
    before), appending when a run continues; a step that is repeated after a stop has its line twice, the later holds.
    """

    def __init__(self, directory: Path, *, batch_size: int):
        directory.mkdir(parents=True, exist_ok=True)
        self._lines = (directory / "steps.jsonl").open("a", encoding="utf-8")
        self._board = _summary_writer(directory)
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
