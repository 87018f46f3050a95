"""A sweep over a cluster, by submitit: one job a subject, each running launch.py, then one that scores and reports.

    python launch.py --config configs/general.py --executor slurm --executor_options partition=gpu,gpus_per_node=1
    python launch.py --config configs/general.py --executor local

All jobs share the work directory. A job that is preempted ends its current step, keeps its state and is queued again.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spqr_jax.config import Config

NAMES = ("slurm", "local")
MINUTES = 24 * 60
LAUNCH = Path(__file__).parents[2] / "launch.py"


class Launch:
    """One run of launch.py as a job; what submitit pickles."""

    def __init__(self, arguments: Sequence[str]):
        self.arguments = list(arguments)
        self._process: subprocess.Popen | None = None

    def __call__(self) -> int:
        """The exit status: 0, or 1 when a cell failed. Raises RuntimeError for any other, so that the job counts as
        failed."""
        self._process = subprocess.Popen([sys.executable, str(LAUNCH), *self.arguments])
        if (status := self._process.wait()) not in (0, 1):
            raise RuntimeError(f"launch.py {' '.join(self.arguments)} ended with status {status}; see this job's log.")
        return status

    def checkpoint(self, *_: Any, **__: Any):
        """Called by submitit when the job is about to be taken: stop in order, and go on in a new job."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        return DelayedSubmission(Launch(self.arguments))


def parse_options(options: Sequence[str]) -> dict[str, Any]:
    """["partition=gpu", "gpus_per_node=1"] -> submitit parameters. Raises ValueError for an option without a value."""
    parsed: dict[str, Any] = {}
    for option in options:
        name, separator, value = option.partition("=")
        if not (name and separator and value):
            raise ValueError(f"--executor_options: {option!r} is not name=value.")
        parsed[name] = int(value) if value.isdigit() else value
    return parsed


def submit(name: str, config: Config, workdir: Path, arguments: Sequence[str], options: Sequence[str]) -> list[Any]:
    """Submit a run and return its jobs, the last of which scores and reports.

    arguments: launch.py's own, without those that choose the executor. options: as for `parse_options`, names as in
    submitit (timeout_min, cpus_per_task, mem_gb, gpus_per_node) or SLURM's own after `slurm_`. Raises ValueError
    for an executor or option that does not exist, ModuleNotFoundError without submitit.
    """
    if name not in NAMES:
        raise ValueError(f"--executor {name!r} is unknown; expected one of {', '.join(NAMES)}.")
    try:
        import submitit
    except ModuleNotFoundError:
        raise ModuleNotFoundError("--executor needs submitit; install the extra [slurm].") from None
    executor = submitit.AutoExecutor(folder=workdir / "jobs" / "%j", cluster=name)
    executor.update_parameters(timeout_min=MINUTES, **_named_for(name, parse_options(options)))
    work = [*arguments, "--workdir", str(workdir), "--nodistributed"]
    with executor.batch():
        jobs = [
            executor.submit(Launch([*work, f'--subjects="{subject.name}"', "--stages=align,generate,finetune,judge"]))
            for subject in config.subjects
        ]
    if name == "slurm":
        executor.update_parameters(slurm_dependency="afterany:" + ":".join(job.job_id for job in jobs))
    else:
        for job in jobs:
            job.wait()
    return [*jobs, executor.submit(Launch([*work, "--stages=score,report"]))]


def _named_for(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """SLURM's own parameters carry its prefix; the common ones and those already prefixed stay."""
    common = {"timeout_min", "cpus_per_task", "mem_gb", "gpus_per_node", "nodes", "tasks_per_node", "name"}
    if name != "slurm":
        return {key: value for key, value in options.items() if key in common}
    return {key if key in common or key.startswith("slurm_") else f"slurm_{key}": v for key, v in options.items()}
