"""Stage align: make every subject safe by its method, or load the checkpoint someone else made safe."""

import json
import time
from typing import Any

import jax
import numpy as np

from spqr_jax import attached, checkpoint, hosts, schedulers, sources, storage
from spqr_jax.cells import SubjectDir
from spqr_jax.methods import METHODS
from spqr_jax.pipeline import Pipeline
from spqr_jax.stages.work import Failure, Run, each, note_seconds


def align(run: Run) -> list[Failure]:
    """Apply each subject's method to the backbone, or load its checkpoint, and keep what changed."""
    missing = hosts.agreed(np.array([not (s.weights / "pipeline.json").exists() for s in run.subjects]))
    todo = [subject for subject, absent in zip(run.subjects, missing, strict=True) if absent]
    return each(todo, lambda s: s.subject.name, lambda s: _align_one(run, s), "align")


def _align_one(run: Run, subject: SubjectDir) -> None:
    start = time.time()
    aligned = _make(run, subject)  # by every process: what a method samples runs on the devices of all
    attached.check_acts(aligned.attached, _evaluations(run))
    changed = {name: params for name, params in aligned.params.items() if not _equal(params, run.backbone.params[name])}
    if changed:
        checkpoint.save(subject.weights / "params", changed)
    if aligned.attached is not None:
        attached.save(subject.weights / "attached", aligned.attached)
    note = {
        "subject": subject.subject.name,
        "method": subject.subject.method,
        "changed": sorted(changed),
        "attached": aligned.attached is not None,
    }
    if hosts.first():
        note_seconds(subject.weights, "align", time.time() - start, 1)
        storage.write_text(subject.weights / "pipeline.json", json.dumps(note, indent=2, sort_keys=True) + "\n")
    hosts.wait(f"aligned {subject.id}")


def _make(run: Run, subject: SubjectDir) -> Pipeline:
    if subject.subject.checkpoint:
        import convert

        return convert.load(subject.subject.checkpoint, base=run.backbone, dtype=run.config.dtype)
    method = METHODS[subject.subject.method]
    concept, seed = sources.concept(run.config), run.config.seed
    return method(run.backbone, concept, seed=seed, progress=True, **subject.subject.options)


def _evaluations(run: Run) -> int:
    """Of the UNet in a sample: PNDM takes one more than it has steps."""
    g = run.config.generation
    return len(schedulers.create(g.scheduler, run.backbone.configs["scheduler"], g.steps).timesteps)


def _equal(a: Any, b: Any) -> bool:
    return a is b or all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def load_subject(run: Run, subject: SubjectDir) -> Pipeline:
    """The aligned pipeline of a subject; weights that cannot be read are set aside and made again.

    Weights are kept for any sampling steps, so what is attached is checked against these: ValueError if it never acts.
    """
    if not (subject.weights / "pipeline.json").exists():
        raise FileNotFoundError(f"subject {subject.subject.name} is not aligned yet; run stage align first.")
    try:
        pipeline = _read(run, subject)
    except (ValueError, FileNotFoundError) as error:
        if hosts.first():
            storage.set_aside(subject.weights, str(error))
        _align_one(run, subject)
        pipeline = _read(run, subject)
    attached.check_acts(pipeline.attached, _evaluations(run))
    return pipeline


def _read(run: Run, subject: SubjectDir) -> Pipeline:
    note = json.loads((subject.weights / "pipeline.json").read_text(encoding="utf-8"))
    pipeline = run.backbone
    if note["changed"]:
        pipeline = pipeline.with_params(**checkpoint.load(subject.weights / "params"))
    if note["attached"]:
        pipeline = pipeline._replace(attached=attached.load(subject.weights / "attached"))
    return pipeline
