"""Stage finetune: benign fine-tuning of every subject, and the images after it, drawn while its model is loaded."""

import json
import time
from typing import Any

import jax
import numpy as np
from safetensors import numpy as safetensors

from spqr_jax import backbones, profiles, protocols
from spqr_jax import finetune as finetune_lib
from spqr_jax import params as params_lib
from spqr_jax.data import Dataset
from spqr_jax.devices import processes
from spqr_jax.files import checkpoint, choices, storage
from spqr_jax.files.layout import Workdir
from spqr_jax.finetune import Adapted
from spqr_jax.pipeline import Pipeline
from spqr_jax.run import adaptations
from spqr_jax.run.bft import num_steps, training_options
from spqr_jax.run.cells import Cell
from spqr_jax.run.stages import record_drift
from spqr_jax.run.stages.align import load_subject
from spqr_jax.run.stages.background import Background
from spqr_jax.run.stages.few_pictures import training_data
from spqr_jax.run.stages.generate import draw_phase
from spqr_jax.run.stages.state import Failure, Run, each, note_seconds
from spqr_jax.training.log import TrainingLog
from spqr_jax.training.memory import Way


def finetune(run: Run, background: Background) -> list[Failure]:
    """Fine-tune every subject under every profile, scenario and seed, and draw the images after it.

    The images of each cell are judged while the next cell is fine-tuned.
    """

    def one(cell: Cell) -> None:
        draw_phase(run, lambda: adapted_pipeline(run, cell), cell.folder, "after", cell.label)
        background.submit(cell)

    done = processes.agreed(np.array([cell.done for cell in run.cells]))
    return each([c for c, d in zip(run.cells, done, strict=True) if not d], lambda c: c.label, one, "finetune")


def adapted_pipeline(run: Run, cell: Cell) -> Pipeline:
    """A cell's subject after its fine-tuning, which runs now if it did not run before. Adapters of a file are merged.

    Saved leaves that cannot be read are set aside, and the fine-tuning runs again.
    """
    subject = load_subject(run, cell.subject)
    if protocols.adapter_of(cell.profile):
        return adaptations.merged(run.config, subject, cell.profile)
    saved, own = cell.folder.adapted, run.config.bft.own
    if processes.agreed(np.array(saved.is_dir())):
        try:
            trained = Adapted(cell.profile, checkpoint.load(saved), run.config.bft.alpha, own.word)
            return finetune_lib.apply(subject, trained)
        except ValueError as error:
            if processes.first():
                storage.set_aside(saved, str(error))
    start = time.time()
    adapted, steps = finetune_subject(run, subject, cell)
    checkpoint.save(saved, adapted.leaves)
    if processes.first():
        if cell.profile in (*profiles.WITH_ADAPTERS, "textual_inversion"):  # files that diffusers loads
            adapter = safetensors.save(finetune_lib.adapter_file(subject, adapted))
            storage.write_bytes(cell.folder.adapter, adapter)
        storage.remove(cell.folder.training)
        note_seconds(cell.folder, "finetune", time.time() - start, steps)
    processes.wait(f"adapted {cell.id}")
    return finetune_lib.apply(subject, adapted)


def finetune_subject(run: Run, subject: Pipeline, cell: Cell) -> tuple[Adapted, int]:
    """One benign fine-tuning as the config says, continued if it was stopped before: (adapted leaves, steps)."""
    bft = run.config.bft
    cell.folder.path.mkdir(parents=True, exist_ok=True)
    data, more = training_data(run, subject, cell)
    steps = num_steps(bft, cell.profile, len(data))
    options = training_options(run.config, cell.profile, steps) | more
    options |= fitting(run, subject, data, cell, options)
    evaluation: dict[str, Any] = {}
    if bft.eval_at:
        evaluation = {"eval_at": (0, *bft.eval_at), "on_eval": record_drift.recorder(run, cell)}
    with TrainingLog(cell.folder.log, batch_size=bft.batch_size) as log:
        adapted = finetune_lib.train(
            subject,
            data,
            cell.profile,
            seed=cell.seed,
            steps=steps,
            **options,
            latents_cache=Workdir(run.workdir).latents,
            checkpoints=cell.folder.training,
            on_step=log if processes.first() else None,
            progress=processes.first(),
            **evaluation,
        )
    return adapted, steps


def fitting(run: Run, subject: Pipeline, data: Dataset, cell: Cell, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a fine-tuning that the config may leave open, as its step fits into the devices.

    What was chosen is kept for fine-tunings that take the same memory, and said beside the log of the cell.
    """
    height, width = data.images(np.arange(1)).shape[1:3]
    bft, weights = run.config.bft, backbones.of(subject).weights(subject)
    key = [
        f"{cell.profile}, {bft.batch_size} images of {height}x{width}",
        f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        f"{params_lib.nbytes(weights) / 1e6:.1f} MB of weights",
        *([f"rank {bft.rank}"] if cell.profile in profiles.WITH_ADAPTERS else []),
        *(name.replace("_", " ") for name in ("text_encoder", "joint_text") if options[name]),
        *(["average"] if bft.ema else []),
        *(f"{name} {value}" for name, value in _given(run).items()),
    ]
    way = Way(
        **choices.remembered(
            Workdir(run.workdir).training_memory,
            ", ".join(key),
            lambda: finetune_lib.way_to_fit(subject, data, cell.profile, **options)._asdict(),
            form=Way()._asdict(),
        )
    )
    if processes.first():
        storage.write_text(cell.folder.memory, json.dumps(way._asdict(), indent=2) + "\n")
    return {"memory": way.memory, "fsdp": way.fsdp}


def _given(run: Run) -> dict[str, Any]:
    """What the config does not leave open."""
    asked = {"accumulate": run.config.bft.accumulate or None, "remat": run.config.bft.remat}
    asked["fsdp"] = run.config.mesh.fsdp
    return {name: value for name, value in asked.items() if value is not None}
