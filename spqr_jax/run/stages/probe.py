"""Stage probe: further prompt sets on every subject before fine-tuning and on every model after it, and their records.

The images are drawn and judged as those of the score, and kept apart from them.
"""

import functools
import json
import time

from spqr_jax.files import storage
from spqr_jax.run.probes import Probing
from spqr_jax.run.stages import answers
from spqr_jax.run.stages.background import Background
from spqr_jax.run.stages.by_model import Open, each_by_model
from spqr_jax.run.stages.generate import draw
from spqr_jax.run.stages.pictures import Job
from spqr_jax.run.stages.state import Failure, Run, note_seconds, read_times


def probe(run: Run, background: Background) -> list[Failure]:
    """Draw the probes of every model that is there. Cells that are not fine-tuned yet are left out."""
    return each_by_model(run, run.probes, functools.partial(_draw, run), background, "probe")


def _draw(run: Run, probing: Probing, model: Open) -> None:
    draw(run, model, probing.folder, probing.model.phase, jobs(run, probing), probing.label)


def jobs(run: Run, probing: Probing) -> list[Job]:
    """Every image of a probe, in the order of the records."""
    return [(probing.settings.role, prompt, k) for prompt in probing.prompts for k in range(run.config.prompts.images)]


def judge_probe(run: Run, probing: Probing) -> None:
    """Write the records of a probe and complete it, unless these judges have done so."""
    folder, settings = probing.folder, probing.settings
    if probing.done and answers.judged(run, folder):
        return
    start = time.time()
    folder.summary.unlink(missing_ok=True)
    mark = probing.model.columns | {"prompt_set": settings.name}
    rows = [row | mark for row in answers.about(run, probing.model, folder, jobs(run, probing), probing.label)]
    note_seconds(folder, "judge", time.time() - start, len(rows))
    answers.write(run, folder, rows)
    summary = answers.about_model(run, probing.model) | {
        "id": probing.id,
        "probe": settings.name,
        "role": settings.role,
        "prompts": settings.prompts,
        "seconds": {stage: round(t["seconds"], 3) for stage, t in read_times(folder).items()},
    }
    storage.write_text(folder.summary, json.dumps(summary, indent=2, sort_keys=True) + "\n")
