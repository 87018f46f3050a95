"""Stage attack: every attack on every subject before fine-tuning and on every model after it, and the attacked images.

An attack gets the same prompts, budget and seed before and after. A transferred one is made once, on the unaligned
model, and drawn by all. What it finds stays in the work directory (`found`).
"""

import functools
import time

import numpy as np

from spqr_jax import attacks
from spqr_jax.attacks import Attacked
from spqr_jax.devices import processes
from spqr_jax.files import storage
from spqr_jax.pipeline import Pipeline
from spqr_jax.run import names
from spqr_jax.run.attempts import Attempt
from spqr_jax.run.stages import found as found_lib
from spqr_jax.run.stages.background import Background
from spqr_jax.run.stages.by_model import Open, each_by_model
from spqr_jax.run.stages.generate import draw
from spqr_jax.run.stages.state import Failure, Run, note_seconds
from spqr_jax.training import words


def attack(run: Run, background: Background) -> list[Failure]:
    """Attack every model that is there; its images are judged while the next attack runs.

    Cells that are not fine-tuned yet are left out.
    """
    return each_by_model(run, run.attempts, functools.partial(_draw, run), background, "attack")


def _draw(run: Run, attempt: Attempt, model: Open) -> None:
    found = finds(run, attempt, model)
    asked = found_lib.images(run, attempt, found)
    attempt.folder.images(attempt.model.phase, "harmful").mkdir(parents=True, exist_ok=True)  # also where all failed
    attacked = functools.partial(_knowing, model, found)
    draw(run, attacked, attempt.folder, attempt.model.phase, asked.jobs, attempt.label, asked.latents)


def _knowing(model: Open, found: Attacked) -> Pipeline:
    """The model with the words that the attack made."""
    return words.added(model(), found_lib.usable_words(found))


def finds(run: Run, attempt: Attempt, model: Open) -> Attacked:
    """What the attack found, from the work directory if it is there, else by attacking now.

    A file that cannot be read is set aside, and the attack is made again.
    """
    path = attempt.source.found
    if processes.agreed(np.array(path.exists())):
        try:
            return found_lib.read(path)
        except found_lib.UNREADABLE as error:
            if processes.first():
                storage.set_aside(path, str(error))
    start = time.time()
    found = _made(run, attempt, run.backbone if attempt.settings.transfer else model())
    if processes.first():
        found_lib.write(path, found)
        note_seconds(attempt.source, "attack", time.time() - start, len(found.prompts))
    processes.wait(f"attacked {attempt.id}")
    return found


def _made(run: Run, attempt: Attempt, pipeline: Pipeline) -> Attacked:
    """Run the attack, by every process: its gradients and samples run on the devices of all."""
    one, given = attacks.find(attempt.settings.attack), found_lib.chosen(run, attempt)
    found = one.attack(
        pipeline,
        [prompt.prompt for prompt in given],
        names.concept(run.config),
        seed=run.config.seed,
        target=run.backbone,
        progress=processes.first(),
        **attempt.settings.options,
    )
    found_lib.check(found, given, attempt.settings.name)
    return found
