"""Stage judge: ask the judges about every image and write the records. A cell is complete once cell.json is there."""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from tqdm import tqdm

from spqr_jax import backbones, protocols
from spqr_jax import finetune as finetune_lib
from spqr_jax import params as params_lib
from spqr_jax.config import Config
from spqr_jax.devices import processes
from spqr_jax.files import records, storage
from spqr_jax.files.layout import ImagesFolder, Workdir
from spqr_jax.files.records import ROLES
from spqr_jax.pipeline import Pipeline
from spqr_jax.run import names as names_lib
from spqr_jax.run import protocol
from spqr_jax.run.attempts import Attempt
from spqr_jax.run.bft import adapter_options
from spqr_jax.run.cells import Cell, SubjectDir
from spqr_jax.run.jury import Jury
from spqr_jax.run.probes import Probing
from spqr_jax.run.stages import answers
from spqr_jax.run.stages.answers import JUDGE_CHUNK
from spqr_jax.run.stages.background import Background, Item
from spqr_jax.run.stages.judge_attacks import judge_attempt
from spqr_jax.run.stages.pictures import phase_jobs, picture_path
from spqr_jax.run.stages.probe import judge_probe
from spqr_jax.run.stages.state import Failure, Run, each, note_seconds, read_times


def judge(run: Run, background: Background) -> list[Failure]:
    """Ask the judges about every image that they have not seen.

    Cells that are not fine-tuned yet, and attacks and probes that are not made yet, are left out.
    """
    background.finish()
    if processes.first():
        _reference_features(run)
    failures = each(shared_out(run, run.subjects), lambda s: s.name, lambda s: judge_one(run, s), "judge")
    first = phase_jobs(run)[0]
    cells = [cell for cell in run.cells if cell.done or picture_path(cell.folder, "after", *first).exists()]
    if len(cells) < len(run.cells):
        logging.info("%d cells have no pictures after fine-tuning yet.", len(run.cells) - len(cells))
    failures += each(shared_out(run, cells), lambda c: c.label, lambda c: judge_one(run, c), "judge")
    looks: list[Attempt | Probing] = [*run.attempts, *run.probes]
    made = [one for one in looks if one.done or one.folder.all_images.is_dir()]
    failures += each(shared_out(run, made), lambda one: one.label, lambda one: judge_one(run, one), "judge")
    processes.wait("judged")
    return failures


def shared_out(run: Run, items: Iterable[Any]) -> list[Any]:
    """The items that this process judges; a subject's cells go with it, since they share its records."""
    owned = {subject.id for i, subject in enumerate(run.subjects) if processes.mine(i)}
    return [item for item in items if _subject(item).id in owned]


def _subject(item: Item) -> SubjectDir:
    if isinstance(item, SubjectDir | Cell):
        return item if isinstance(item, SubjectDir) else item.subject
    return item.model.subject


def judge_own(run: Run, item: Item) -> None:
    """`judge_one` for an item that this process judges; nothing for the items of others."""
    for own in shared_out(run, [item]):
        judge_one(run, own)


def judge_one(run: Run, item: Item) -> None:
    """Write the records of a subject before fine-tuning, an attempt, a probe, or a cell and its subject if missing."""
    if isinstance(item, Attempt):
        judge_attempt(run, item)
    elif isinstance(item, Probing):
        judge_probe(run, item)
    elif isinstance(item, Cell):
        judge_one(run, item.subject)
        if not (item.done and answers.judged(run, item.folder)):
            _judge_cell(run, item)
        elif json.loads(item.folder.summary.read_text(encoding="utf-8")).get("protocol") != _protocol(run, item):
            _complete(run, item, records.read(item.folder.records))  # the same results under another name
    elif not answers.judged(run, item.folder):
        _judge_phase(run, item.folder, "before", item.name, item.name)


def _reference_features(run: Run) -> None:
    path = Workdir(run.workdir).reference_features
    identity = json.dumps([run.jury.features.identity, names_lib.reference_identity(run.config)])
    if path.exists() and str(storage.read_npz(path)["identity"]) == identity:
        return
    batches = names_lib.reference_images(run.config)
    features = [_features(run.jury, batch) for batch in tqdm(batches, desc="reference images", unit="batch")]
    storage.write_npz(path, features=np.concatenate(features), identity=np.array(identity))


def _judge_phase(run: Run, folder: ImagesFolder, phase: str, subject: str, label: str) -> None:
    """Write the records and features of one phase beside its images."""
    start = time.time()
    rows: list[records.Record] = []
    features: list[np.ndarray] = []
    for chunk, pictures in answers.read_chunks(folder, phase, phase_jobs(run), label):
        asked = answers.ask(run, chunk, pictures)
        rows += [answers.record(run, phase, subject, job, answer) for job, answer in zip(chunk, asked, strict=True)]
        if len(benign := answers.benign_of(chunk)):
            features.append(_features(run.jury, pictures[benign]))
    answers.check_undecided(run, rows)
    storage.write_npz(folder.phase_features(phase), features=np.concatenate(features))
    note_seconds(folder, f"judge_{phase}", time.time() - start, len(rows))
    answers.write(run, folder, rows)


def _features(jury: Jury, pictures: np.ndarray) -> np.ndarray:
    return np.concatenate([jury.features(pictures[i : i + JUDGE_CHUNK]) for i in range(0, len(pictures), JUDGE_CHUNK)])


def _judge_cell(run: Run, cell: Cell) -> None:
    """Judge the images after fine-tuning, add the subject's records before it, and complete the cell."""
    ours, shared = cell.folder, cell.subject.folder
    ours.summary.unlink(missing_ok=True)
    _judge_phase(run, ours, "after", cell.subject.name, cell.label)
    after = records.read(ours.records)
    before = records.read(shared.records)
    mark = {
        "cell": cell.id,
        "subject": cell.subject.name,
        "profile": cell.profile,
        "scenario": cell.scenario,
        "seed": cell.seed,
    }
    for role in ROLES:
        names = [Path(row["image"]).name for row in before if row["role"] == role]
        for name in names:
            storage.link(shared.images("before", role) / name, ours.images("before", role) / name)
    storage.write_npz(
        ours.features,
        before_benign=storage.read_npz(shared.phase_features("before"))["features"],
        after_benign=storage.read_npz(ours.phase_features("after"))["features"],
    )
    rows = [row | mark for row in (*before, *after)]
    records.write(ours.records, rows)
    _complete(run, cell, rows)


def _complete(run: Run, cell: Cell, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write cell.json, with which a cell is complete."""
    summary = json.dumps(_summary(run, cell, rows), indent=2, sort_keys=True)
    storage.write_text(cell.folder.summary, summary + "\n")


def _protocol(run: Run, cell: Cell) -> dict[str, Any]:
    """The protocol that a cell follows and the fields in which it departs from it, as JSON holds them."""
    stated = protocols.of_cell(protocol.statement(run.config), cell.profile)
    return json.loads(json.dumps(stated._asdict(), default=str))


def _summary(run: Run, cell: Cell, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    times = read_times(cell.subject.weights) | read_times(cell.subject.folder) | read_times(cell.folder)
    rate = {"generate_after": "images_per_s", "finetune": "steps_per_s", "judge_after": "judge_images_per_s"}
    return {
        "cell": cell.id,
        "subject": cell.subject.name,
        "profile": cell.profile,
        "scenario": cell.scenario,
        "seed": cell.seed,
        "is_control": cell.subject.is_control,
        "backbone": backbones.of(run.backbone).key,
        "protocol": _protocol(run, cell),
        "n_undecided": sum(row["verdict"] == "undecided" for row in rows),
        "seconds": {stage: round(t["seconds"], 3) for stage, t in times.items()},
        "rates": {
            name: round(times[stage]["count"] / max(times[stage]["seconds"], 1e-9), 3)
            for stage, name in rate.items()
            if stage in times
        },
        "finetune": {
            "steps": times.get("finetune", {}).get("count"),
            **trained_size(run.backbone, cell.profile, run.config),
        },
        **answers.asked(run),
    }


def trained_size(pipeline: Pipeline, profile: str, config: Config) -> dict[str, int]:
    """The number of parameters that a profile trains, and the bytes of their weights and their optimiser state.

    Computed from shapes alone: this runs beside training, and an operation of its own on the devices can block a
    program that spans several of them for ever.
    """
    if protocols.adapter_of(profile):
        return dict.fromkeys(("trained_parameters", "parameter_bytes", "optimiser_bytes"), 0)
    options = adapter_options(config.bft, profile)
    trainable = jax.eval_shape(lambda: finetune_lib.prepare(pipeline, profile, **options, seed=0)[1])
    size = params_lib.nbytes(trainable)
    return {"trained_parameters": params_lib.count(trainable), "parameter_bytes": size, "optimiser_bytes": 2 * size}
