"""The judges' answers about attacked images: records like any other, in a folder of their own.

They hold the prompts as they were given to the attack. What it made of them is in found.npz alone.
"""

import json
import time
from collections.abc import Sequence
from typing import Any

from spqr_jax import attacks
from spqr_jax.files import storage
from spqr_jax.run.attempts import Attempt, n_prompts, prompt_set
from spqr_jax.run.stages import answers
from spqr_jax.run.stages import found as found_lib
from spqr_jax.run.stages.answers import Answer
from spqr_jax.run.stages.found import Asked
from spqr_jax.run.stages.state import Run, note_seconds, read_times

# Of an image that was not drawn, because the attack found nothing finite.
FAILED = Answer("{}", "undecided", float("nan"))


def judge_attempt(run: Run, attempt: Attempt) -> None:
    """Write the records of an attempt and complete it, unless these judges have done so."""
    if attempt.done and answers.judged(run, attempt.folder):
        return
    start = time.time()
    attempt.folder.summary.unlink(missing_ok=True)
    found = found_lib.read(attempt.source.found)
    rows = _rows(run, attempt, found_lib.images(run, attempt, found))
    note_seconds(attempt.folder, "judge", time.time() - start, len(rows))
    answers.write(run, attempt.folder, rows)
    summary = _summary(run, attempt, rows) | {"queries": found.queries, "failed": int(found_lib.failed(found).sum())}
    storage.write_text(attempt.folder.summary, json.dumps(summary, indent=2, sort_keys=True) + "\n")


def _rows(run: Run, attempt: Attempt, asked: Asked) -> list[dict[str, Any]]:
    """The records in the order of the given prompts, also of the images that a failed attack did not ask for."""
    phase, subject = attempt.model.phase, attempt.model.subject.name
    drawn = answers.about(run, attempt.model, attempt.folder, asked.jobs, attempt.label)
    failed = [answers.record(run, phase, subject, job, FAILED) | {"image": ""} for job in asked.failed]
    prompts = {prompt.id: (i, prompt.prompt) for i, prompt in enumerate(found_lib.chosen(run, attempt))}
    mark = attempt.model.columns | {"prompt_set": prompt_set(run.config, attempt.settings)}
    rows = [row | mark | {"prompt": prompts[row["prompt_id"]][1]} for row in (*drawn, *failed)]
    return sorted(rows, key=lambda row: (prompts[row["prompt_id"]][0], row["k"]))


def _summary(run: Run, attempt: Attempt, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """attack.json but for what the attack found: which attack on which model, and by which judges."""
    settings, own = attempt.settings, read_times(attempt.folder)
    times = read_times(attempt.source, "attack") | own
    return {
        **answers.about_model(run, attempt.model),
        "id": attempt.id,
        "attack": settings.name,
        "kind": settings.attack,
        "access": attacks.find(settings.attack).access,
        "transfer": settings.transfer,
        "options": settings.options,
        "n_prompts": n_prompts(run.config, settings),
        "n_undecided": sum(row["verdict"] == "undecided" for row in rows),
        "seconds": {stage: round(t["seconds"], 3) for stage, t in times.items()},
    }
