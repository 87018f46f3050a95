"""Stage align: make every subject safe by its method, or load the checkpoint that someone else made safe."""

import json
import time
from typing import Any

import jax
import numpy as np

import convert
from spqr_jax import backbones, methods
from spqr_jax import params as params_lib
from spqr_jax.backbones.models import clip_text
from spqr_jax.devices import processes
from spqr_jax.files import checkpoint, storage
from spqr_jax.methods.base import check_finite, check_result
from spqr_jax.params import Params
from spqr_jax.pipeline import Pipeline
from spqr_jax.run import names
from spqr_jax.run.cells import SubjectDir
from spqr_jax.run.generation import sampling_options
from spqr_jax.run.stages.background import Background
from spqr_jax.run.stages.state import Failure, Run, each, note_seconds
from spqr_jax.sampling import attached
from spqr_jax.sampling import call as call_lib
from spqr_jax.sampling.call import Sampling


def align(run: Run, background: Background) -> list[Failure]:
    """Apply each subject's method to the backbone, or load its checkpoint, and keep the components that changed."""
    del background
    missing = processes.agreed(np.array([not s.weights.note.exists() for s in run.subjects]))
    todo = [subject for subject, absent in zip(run.subjects, missing, strict=True) if absent]
    return each(todo, lambda s: s.name, lambda s: _align_one(run, s), "align")


def _align_one(run: Run, subject: SubjectDir) -> None:
    start = time.time()
    aligned = make_safe(run, subject)  # by every process: a method's own sampling runs on the devices of all
    attached.check(aligned.attached, _evaluations(run))
    changed = {name: params for name, params in aligned.params.items() if not _equal(params, run.backbone.params[name])}
    if changed:
        checkpoint.save(subject.weights.params, changed)
    if aligned.attached:
        attached.save(subject.weights.attached, aligned.attached)
    note = {
        "subject": subject.name,
        "method": subject.settings.method,
        "changed": sorted(changed),
        "attached": bool(aligned.attached),
    }
    if processes.first():
        note_seconds(subject.weights, "align", time.time() - start, 1)
        storage.write_text(subject.weights.note, json.dumps(note, indent=2, sort_keys=True) + "\n")
    processes.wait(f"aligned {subject.id}")


def make_safe(run: Run, subject: SubjectDir) -> Pipeline:
    """The backbone aligned by the subject's method, or the subject's checkpoint."""
    if subject.settings.checkpoint:
        loaded = convert.load(subject.settings.checkpoint, base=run.backbone, dtype=run.config.dtype)
        check_same_kind(loaded, run.backbone, subject.settings.checkpoint)
        return loaded
    method = methods.find(subject.settings.method)
    concept, seed = names.concept(run.config), run.config.seed
    # In float32 whatever the run's dtype: in bfloat16 the methods' small steps would be rounded away.
    exact = {name: params_lib.cast(params, np.float32) for name, params in run.backbone.params.items()}
    progress = {"progress": True} if "progress" in methods.options(method) else {}
    aligned = method.align(
        run.backbone.with_params(**exact), concept, **{"seed": seed, **progress, **subject.settings.options}
    )
    check_result(method, run.backbone, aligned)
    check_finite(method, run.backbone, aligned)
    kept = {name: _like(params, run.backbone.params[name]) for name, params in aligned.params.items()}
    return aligned.with_params(**kept)


def _like(params: Params, other: Params) -> Params:
    """The weights in the dtypes of another tree's; leaves that have theirs already are the same objects."""
    return jax.tree.map(lambda x, like: x if x.dtype == like.dtype else x.astype(like.dtype), params, other)


def check_same_kind(loaded: Pipeline, backbone: Pipeline, source: str) -> None:
    """Raise ValueError for a checkpoint that was made for another kind of backbone.

    Only the checkpoint's weights are kept, and they run in the backbone's layers and schedule. So both configs must
    agree on everything that decides the images.
    """
    kinds = [_kind(pipeline) for pipeline in (loaded, backbone)]
    differing = [name for name in kinds[0] if kinds[0][name] != kinds[1].get(name)]
    if differing:
        name = differing[0]
        found, expected = (kind.get(name) for kind in kinds)
        detail = f": {found!r}, expected {expected!r}" if isinstance(found, str | int | float) else ""
        raise ValueError(
            f"checkpoint {source} is of another kind than the backbone {backbone.name} ({name} differs{detail}); set "
            "config.base to what it was made from."
        )


def _kind(pipeline: Pipeline) -> dict[str, Any]:
    backbone = backbones.of(pipeline)
    layered = (backbone.denoiser, backbone.autoencoder)
    kind: dict[str, Any] = {f"layers of {component}": pipeline.definitions[component] for component in layered}
    kind[f"scaling_factor of {backbone.autoencoder}"] = backbone.scaling(pipeline)
    kind["prediction_type of scheduler"] = backbones.prediction(pipeline)
    for component in sorted(set(pipeline.params) - set(layered)):
        config = clip_text.DEFAULTS | pipeline.configs[component]
        kind |= {f"{key} of {component}": config[key] for key in ("hidden_act", "num_attention_heads")}
    return kind


def _evaluations(run: Run) -> int:
    """How often a sample evaluates the UNet: PNDM does it once more than it has steps."""
    return len(call_lib.tables_of(run.backbone, Sampling(**sampling_options(run.config))).timesteps)


def _equal(a: Any, b: Any) -> bool:
    return all(x is y or np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def load_subject(run: Run, subject: SubjectDir) -> Pipeline:
    """The aligned pipeline of a subject; weights that cannot be read are set aside and made again.

    Weights are kept for any number of sampling steps. Raises ValueError if guidance that the method attached would
    never act within the steps of this run.
    """
    if not subject.weights.note.exists():
        raise FileNotFoundError(f"subject {subject.name} is not aligned yet; run stage align first.")
    try:
        pipeline = _read(run, subject)
    except (ValueError, FileNotFoundError) as error:
        if processes.first():
            storage.set_aside(subject.weights.path, str(error))
        _align_one(run, subject)
        pipeline = _read(run, subject)
    attached.check(pipeline.attached, _evaluations(run))
    return pipeline


def _read(run: Run, subject: SubjectDir) -> Pipeline:
    note = json.loads(subject.weights.note.read_text(encoding="utf-8"))
    pipeline = run.backbone
    if note["changed"]:
        pipeline = pipeline.with_params(**checkpoint.load(subject.weights.params))
    if note["attached"]:
        pipeline = pipeline._replace(attached=attached.load(subject.weights.attached))
    return pipeline
