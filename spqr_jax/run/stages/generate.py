"""Stage generate: the images before fine-tuning, and the drawing of a phase's images, which stage finetune uses too.

A phase is "before" or "after" fine-tuning: harmful and benign images as PNG files that are made once.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from spqr_jax import backbones
from spqr_jax import generate as generate_lib
from spqr_jax import params as params_lib
from spqr_jax.devices import preemption, processes
from spqr_jax.files import images, storage
from spqr_jax.files.layout import ImagesFolder, Workdir
from spqr_jax.pipeline import Pipeline
from spqr_jax.run.cells import SubjectDir
from spqr_jax.run.generation import sampling_options
from spqr_jax.run.stages.align import load_subject
from spqr_jax.run.stages.background import Background
from spqr_jax.run.stages.pictures import Job, image_seed, phase_jobs, picture_path
from spqr_jax.run.stages.state import Failure, Run, each, note_seconds
from spqr_jax.sampling import batch_size as batch_size_lib


def generate(run: Run, background: Background) -> list[Failure]:
    """Draw the images of every subject before fine-tuning; each subject's are judged while the next one's are drawn."""

    def one(subject: SubjectDir) -> None:
        draw_phase(run, lambda: load_subject(run, subject), subject.folder, "before", subject.name)
        background.submit(subject)

    return each(run.subjects, lambda s: s.name, one, "generate")


def draw_phase(run: Run, pipeline: Callable[[], Pipeline], folder: ImagesFolder, phase: str, label: str) -> None:
    """Draw the missing images of a phase, as `draw` does."""
    draw(run, pipeline, folder, phase, phase_jobs(run), label)


def draw(
    run: Run,
    pipeline: Callable[[], Pipeline],
    folder: ImagesFolder,
    phase: str,
    jobs: list[Job],
    label: str,
    latents: np.ndarray | None = None,
) -> None:
    """Draw those images of N jobs that are missing. Batches are cut by index, so a resumed run repeats the same ones.

    pipeline: returns the model to draw with, fine-tuning it first if need be; called only if an image is missing.
    latents: what the images start from [N, h, w, C], in place of the noise of their seeds.
    """
    paths = [picture_path(folder, phase, *job) for job in jobs]
    # As the first process sees the disk.
    there = processes.agreed(np.array([_there(path) if processes.first() else True for path in paths]))
    if there.all():
        return
    for directory in {path.parent for path in paths}:
        directory.mkdir(parents=True, exist_ok=True)
    made = pipeline()  # before the clock starts, since a fine-tuning is timed apart
    size = batch_size(run, made, jobs)
    missing = _missing(there, size)
    start = time.time()
    with tqdm(total=len(missing), desc=f"{phase} BFT: {label}", unit="image", disable=not processes.first()) as bar:
        start_from = None if latents is None else latents[missing]
        for first, batch in stream(run, made, [jobs[i] for i in missing], size, start_from):
            for i, image in zip(missing[first : first + len(batch)], batch, strict=True):
                if processes.mine(i):
                    images.write(paths[i], image)
            bar.update(len(batch))
            preemption.exit_if_asked()
    processes.wait(f"pictures {phase} {folder.name}")
    if processes.first():
        note_seconds(folder, f"generate_{phase}", time.time() - start, len(missing))


def _missing(there: np.ndarray, size: int) -> list[int]:
    """Rows of every batch of `size` that lacks an image."""
    batches = [range(start, min(start + size, len(there))) for start in range(0, len(there), size)]
    return [i for batch in batches if not all(there[i] for i in batch) for i in batch]


def batch_size(run: Run, pipeline: Pipeline, jobs: list[Job], *, training: bool = False) -> int:
    """Images a batch: as the config says, else as many as fit. The choice is kept for jobs that take the same memory.

    training: the devices hold the state of a fine-tuning too.
    """
    g, guidance = run.config.generation, max(_guidance(run, jobs))
    if g.batch_size:
        return min(g.batch_size, len(jobs))
    backbone = backbones.of(pipeline)
    side = backbone.side(pipeline)
    key = [
        f"{len(jobs)} pictures of {g.height or side}x{g.width or side}",
        f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        f"{params_lib.nbytes(backbone.weights(pipeline)) / 1e6:.1f} MB of weights",
        *(["split"] if run.config.mesh.fsdp else []),
        *(["guided"] if guidance > 1 else []),
        *sorted(f"attached {one.kind}" for one in pipeline.attached if one.in_loop),
        *(["in training"] if training else []),
    ]
    return batch_size_lib.remembered(
        Workdir(run.workdir).batch_sizes,
        ", ".join(key),
        lambda: generate_lib.largest_batch(pipeline, len(jobs), guidance=guidance, beside=training, **_options(run)),
    )


def _guidance(run: Run, jobs: list[Job]) -> list[float]:
    """The config's guidance; a prompt's own where the file gives one and the config asks for it."""
    scale, own = run.config.generation.guidance, run.config.prompts.own_guidance
    return [prompt.guidance if own and prompt.guidance is not None else scale for _, prompt, _ in jobs]


def _options(run: Run) -> dict[str, Any]:
    """The options of generation that come from the config, but for guidance, which prompts may bring with them."""
    return {**sampling_options(run.config), "fsdp": bool(run.config.mesh.fsdp)}


def stream(run: Run, pipeline: Pipeline, jobs: list[Job], size: int, latents: np.ndarray | None = None):
    """Draw the images of jobs as the config says, batch by batch: (index of the first, images_u8).

    latents: as for `draw`.
    """
    return generate_lib.batches(
        pipeline,
        [prompt.prompt for _, prompt, _ in jobs],
        [image_seed(prompt, k) for _, prompt, k in jobs],
        latents=latents,
        noise=run.config.generation.noise,
        batch_size=size,
        guidance=_guidance(run, jobs),
        **_options(run),
    )


def _there(path: Path) -> bool:
    """Whether an image exists and is whole; a damaged one is named and set aside."""
    if not path.exists():
        return False
    if images.intact(path):
        return True
    storage.set_aside(path, "not a whole picture")
    return False
