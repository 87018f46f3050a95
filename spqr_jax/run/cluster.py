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
from spqr_jax.files import storage
from spqr_jax.files.layout import Workdir

NAMES = ("slurm", "local")
ON_MODELS = ("align", "generate", "finetune", "attack", "judge")  # the stages of one subject
MINUTES = 24 * 60
LAUNCH = Path(__file__).parents[2] / "launch.py"


class Launch:
    """One run of launch.py as a job: the object that submitit pickles."""

    def __init__(self, arguments: Sequence[str]):
        self.arguments = list(arguments)
        self.process: subprocess.Popen | None = None

    def __call__(self) -> int:
        """The exit status: 0, or 1 when a cell failed. Raises RuntimeError for any other, so that the job counts as
        failed."""
        self.process = subprocess.Popen([sys.executable, str(LAUNCH), *self.arguments])
        if (status := self.process.wait()) not in (0, 1):
            raise RuntimeError(f"launch.py {' '.join(self.arguments)} ended with status {status}; see this job's log.")
        return status

    def checkpoint(self, *_: Any, **__: Any):
        """Called by submitit when the job is about to be taken: stop in order, and go on in a new job."""
        from submitit.helpers import DelayedSubmission

        if self.process is not None:
            self.process.terminate()
            self.process.wait()
        return DelayedSubmission(Launch(self.arguments))


def submit_command(name: str, config: Config, workdir: Path, arguments: Sequence[str], options: Sequence[str]) -> int:
    """Hand a command to a cluster and print the jobs' numbers; the local executor's jobs are waited for.

    arguments: launch.py's own. name, options: as for `submit`. The exit status: 1 if a local job failed, else 0.
    Raises ValueError for a work directory that is no local path, and as `submit`.
    """
    if storage.remote(workdir):
        raise ValueError(f"--executor keeps its jobs' files in the work directory, which cannot be {workdir}.")
    jobs = submit(name, config, workdir, for_jobs(arguments), options)
    logs = Workdir(workdir).jobs
    print(f"Submitted {len(jobs) - 1} jobs, one a subject, and {jobs[-1].job_id} for the report; logs in {logs}.")
    failed = [job.job_id for job in jobs if job.exception() or job.result()] if name == "local" else []
    if failed:
        print(f"Not finished: jobs {', '.join(failed)}; see their logs in {logs}.", file=sys.stderr)
    return int(bool(failed))


def for_jobs(arguments: Sequence[str]) -> list[str]:
    """launch.py's arguments without those that every job gets anew: the executor's and the work directory."""
    kept, skip = [], False
    for argument in arguments:
        own = argument.startswith(("--executor", "--workdir"))
        if not skip and not own:
            kept.append(argument)
        skip = not skip and own and "=" not in argument
    return kept


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

    name: "slurm" or "local". arguments: as `for_jobs` returns them. options: as for `parse_options`; their names are
    submitit's (timeout_min, cpus_per_task, mem_gb, gpus_per_node) or SLURM's. Raises ValueError for an unknown executor
    or an option without a value, ModuleNotFoundError without submitit.
    """
    if name not in NAMES:
        raise ValueError(f"--executor {name!r} is unknown; expected one of {', '.join(NAMES)}.")
    try:
        import submitit
    except ModuleNotFoundError:
        raise ModuleNotFoundError("--executor needs submitit; install the extra [slurm].") from None
    executor = submitit.AutoExecutor(folder=Workdir(workdir).jobs / "%j", cluster=name)
    executor.update_parameters(timeout_min=MINUTES, **named_for(name, parse_options(options)))
    work = [*arguments, "--workdir", str(workdir), "--nodistributed"]
    with executor.batch():
        jobs = [
            executor.submit(Launch([*work, f'--subjects="{subject.name}"', f"--stages={','.join(ON_MODELS)}"]))
            for subject in config.subjects
        ]
    if name == "slurm":
        executor.update_parameters(slurm_dependency="afterany:" + ":".join(job.job_id for job in jobs))
    else:
        for job in jobs:
            job.wait()
    return [*jobs, executor.submit(Launch([*work, "--stages=score,report"]))]


def named_for(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options as submitit names them for this executor: for "slurm", SLURM's own get the prefix slurm_; for
    "local", they are left out."""
    common = {"timeout_min", "cpus_per_task", "mem_gb", "gpus_per_node", "nodes", "tasks_per_node", "name"}
    if name != "slurm":
        return {key: value for key, value in options.items() if key in common}
    return {key if key in common or key.startswith("slurm_") else f"slurm_{key}": v for key, v in options.items()}
