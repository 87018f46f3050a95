"""Stage generate: the pictures of a phase, harmful and benign, as PNG files that are made once."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from spqr_jax import generate, hosts, images, preemption, storage
from spqr_jax.cells import SubjectDir
from spqr_jax.pipeline import Pipeline
from spqr_jax.stages.align import load_subject
from spqr_jax.stages.background import Background
from spqr_jax.stages.phase import Job, image_seed, phase_jobs, picture_path
from spqr_jax.stages.work import Failure, Run, each, note_seconds


def generate_before(run: Run, background: Background) -> list[Failure]:
    """Pictures of every subject before fine-tuning; each subject's go to the judges while the next one's are made."""

    def one(subject: SubjectDir) -> None:
        pictures(run, lambda: load_subject(run, subject), subject.root, "before", subject.subject.name)
        background.submit(subject)

    return each(run.subjects, lambda s: s.subject.name, one, "generate")


def pictures(run: Run, pipeline: Callable[[], Pipeline], root: Path, phase: str, label: str) -> None:
    """Write the missing pictures of a phase. Batches are cut by index, so a resumed run repeats the same batches."""
    jobs = phase_jobs(run)
    paths = [picture_path(root, phase, *job) for job in jobs]
    size = run.config.generation.batch_size or min(generate.MAX_BATCH, len(jobs))
    missing = _missing(paths, size)
    if not missing:
        return
    for folder in {path.parent for path in paths}:
        folder.mkdir(parents=True, exist_ok=True)
    made = pipeline()  # may fine-tune first, which is timed apart
    start = time.time()
    with tqdm(total=len(missing), desc=f"{phase} BFT: {label}", unit="image", disable=not hosts.first()) as bar:
        for first, batch in stream(run, made, [jobs[i] for i in missing], size):
            for i, image in zip(missing[first : first + len(batch)], batch, strict=True):
                if hosts.mine(i):
                    images.write(paths[i], image)
            bar.update(len(batch))
            preemption.exit_if_asked()
    hosts.wait(f"pictures {phase} {root.name}")
    if hosts.first():
        note_seconds(root, f"generate_{phase}", time.time() - start, len(missing))


def _missing(paths: list[Path], size: int) -> list[int]:
    """Rows of every batch of `size` that lacks a picture, as the first process sees the disk."""
    there = hosts.agreed(np.array([_there(path) if hosts.first() else True for path in paths]))
    batches = [range(start, min(start + size, len(paths))) for start in range(0, len(paths), size)]
    return [i for batch in batches if not all(there[i] for i in batch) for i in batch]


def stream(run: Run, pipeline: Pipeline, jobs: list[Job], batch_size: int):
    """Pictures of jobs as the config says, batch by batch: (index of the first, images_u8)."""
    g = run.config.generation
    return generate.batches(
        pipeline,
        [prompt.prompt for _, prompt, _ in jobs],
        [image_seed(prompt, k) for _, prompt, k in jobs],
        steps=g.steps,
        guidance=[g.guidance if prompt.guidance is None else prompt.guidance for _, prompt, _ in jobs],
        height=g.height or None,
        width=g.width or None,
        negative=g.negative,
        scheduler=g.scheduler,
        noise=g.noise,
        batch_size=batch_size,
    )


def _there(path: Path) -> bool:
    """Whether a picture exists and is whole; a damaged one is named and set aside."""
    if not path.exists():
        return False
    if images.intact(path):
        return True
    storage.set_aside(path, "not a whole picture")
    return False
