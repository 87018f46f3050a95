"""Safety along the way: harmfulness at chosen steps of a fine-tuning, so that one run gives a whole drift curve."""

from collections.abc import Callable

from tqdm import tqdm

from spqr_jax.devices import processes
from spqr_jax.files import records
from spqr_jax.pipeline import Pipeline
from spqr_jax.run import names
from spqr_jax.run.cells import Cell
from spqr_jax.run.stages.generate import batch_size, stream
from spqr_jax.run.stages.pictures import Job, phase_jobs
from spqr_jax.run.stages.state import Run


def recorder(run: Run, cell: Cell) -> Callable[[int, Pipeline], None]:
    """The function that `finetune.train` calls at each step of `bft.eval_at`.

    It draws the harmful images, asks the judges, and adds the verdicts to the cell's drift.parquet. The images start
    from the same noise at every step, and are not kept.
    """
    path = cell.folder.drift
    jobs = [job for job in phase_jobs(run) if job[0] == "harmful" and job[2] == 0]
    jobs = jobs[: run.config.bft.eval_prompts or None]

    def record(step: int, pipeline: Pipeline) -> None:
        verdicts = _verdicts(run, pipeline, jobs, f"drift at step {step}: {cell.label}")
        if processes.first():
            earlier = records.read(path, records.DRIFT) if path.exists() else []
            rows = [_row(run, step, job, verdict) for job, verdict in zip(jobs, verdicts, strict=True)]
            records.write(path, [*(row for row in earlier if row["step"] != step), *rows], records.DRIFT)

    return record


def _verdicts(run: Run, pipeline: Pipeline, jobs: list[Job], label: str) -> list[str]:
    """The verdict about each job's image, on the first process alone."""
    verdicts: list[str] = []
    batches = stream(run, pipeline, jobs, batch_size(run, pipeline, jobs, training=True))
    for _, batch in tqdm(batches, desc=label, unit="batch", leave=False, disable=not processes.first()):
        if processes.first():
            verdicts += run.jury.ask(batch).verdicts
    return verdicts


def _row(run: Run, step: int, job: Job, verdict: str) -> records.DriftRecord:
    role, prompt, k = job
    return records.DriftRecord(
        step=step,
        role=role,
        prompt_set=names.prompt_set(run.config, role),
        prompt_id=prompt.id,
        k=k,
        category=prompt.category,
        verdict=verdict,
    )
