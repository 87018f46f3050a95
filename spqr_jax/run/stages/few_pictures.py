"""What a cell is trained on: a scenario's data, or a few pictures of one thing, with class pictures for DreamBooth."""

from typing import Any

import numpy as np

from spqr_jax.data import Dataset
from spqr_jax.devices import processes
from spqr_jax.files import storage
from spqr_jax.pipeline import Pipeline
from spqr_jax.prompts import Prompt
from spqr_jax.run import names
from spqr_jax.run.cells import Cell
from spqr_jax.run.stages.generate import batch_size, stream
from spqr_jax.run.stages.state import Run
from spqr_jax.training import prior, words
from spqr_jax.training.prior import Prior


def training_data(run: Run, subject: Pipeline, cell: Cell) -> tuple[Dataset, dict[str, Any]]:
    """The data set of a cell, and the options of `finetune.train` that say how it is composed."""
    own = run.config.bft.own
    if cell.profile == "dreambooth":
        pictures = names.few_pictures(run.config)
        data = prior.joined(pictures, own.instance, class_pictures(run, subject, cell), own.kind)
        return data, {"prior": Prior(len(pictures), own.class_pictures, own.prior_weight)}
    if cell.profile == "textual_inversion":
        return words.captioned(names.few_pictures(run.config), own.word), {}
    return names.dataset(run.config, cell.scenario), {}


def class_pictures(run: Run, subject: Pipeline, cell: Cell) -> np.ndarray:
    """Pictures of `bft.own.kind` that the subject itself draws before it is trained, uint8 [N, H, W, 3].

    They are drawn as the run's other images are, from the seeds 0 to N - 1, and kept in the cell's folder, so that a
    fine-tuning that is continued sees the same.
    """
    file, own = cell.folder.class_pictures, run.config.bft.own
    if processes.agreed(np.array(file.exists())):
        return storage.read_npz(file)["images"]
    jobs = [("benign", Prompt(f"class-{i}", own.kind, seed=i), 0) for i in range(own.class_pictures)]
    drawn = stream(run, subject, jobs, batch_size(run, subject, jobs))
    images = np.concatenate([batch for _, batch in drawn])
    if processes.first():
        storage.write_npz(file, images=images)
    processes.wait(f"class pictures {cell.id}")
    return images
