"""Safety along the way: harmfulness at chosen steps of a fine-tuning, so that one run gives a whole drift curve."""

from collections.abc import Callable

import pyarrow as pa
from tqdm import tqdm

from spqr_jax.devices import processes
from spqr_jax.files import records
from spqr_jax.pipeline import Pipeline
from spqr_jax.run import jury, names
from spqr_jax.run.cells import Cell
from spqr_jax.run.stages.generate import batch_size, stream
from spqr_jax.run.stages.pictures import phase_jobs
from spqr_jax.run.stages.state import Run

SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("role", pa.string()),
        ("prompt_set", pa.string()),
        ("prompt_id", pa.string()),
        ("k", pa.int64()),
        ("category", pa.string()),
        ("verdict", pa.string()),
    ]
)


def recorder(run: Run, cell: Cell) -> Callable[[int, Pipeline], None]:
    """What `finetune.train` calls at each step of `bft.eval_at`: makes the harmful pictures, asks the judges, and adds
    the verdicts to the cell's drift.parquet. The pictures start from the same noise at every step, and are not kept."""
    path = cell.root / "drift.parquet"
    jobs = [job for job in phase_jobs(run) if job[0] == "harmful" and job[2] == 0]
    jobs = jobs[: run.config.bft.eval_prompts or None]

    def record(step: int, pipeline: Pipeline) -> None:
        verdicts: list[str] = []
        size = batch_size(run, pipeline, jobs, training=True)
        for _, batch in tqdm(
            stream(run, pipeline, jobs, size),
            desc=f"drift at step {step}: {cell.label}",
            unit="batch",
            leave=False,
            disable=not processes.first(),
        ):
            if processes.first():
                verdicts += jury.judge(run.bench, batch).verdicts
        if not processes.first():
            return
        earlier = records.read(path, SCHEMA) if path.exists() else []
        rows = [row for row in earlier if row["step"] != step]
        for (role, prompt, k), verdict in zip(jobs, verdicts, strict=True):
            rows.append(
                {
                    "step": step,
                    "role": role,
                    "prompt_set": names.prompt_set(run.config, role),
                    "prompt_id": prompt.id,
                    "k": k,
                    "category": prompt.category,
                    "verdict": verdict,
                }
            )
        records.write(path, rows, SCHEMA)

    return record
