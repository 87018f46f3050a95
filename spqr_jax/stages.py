"""The stages of a run, in order: align, generate, finetune, judge, score, report.

Each stage does only what is missing on disk, so the same command continues after any stop. A subject or cell that fails
is reported and the others go on.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from tqdm import tqdm

from spqr_jax import cells as cells_lib
from spqr_jax import checkpoint, finetune, generate, images, judging, records, sources
from spqr_jax import params as params_lib
from spqr_jax.cells import ROLES, Cell, SubjectDir
from spqr_jax.config import Config
from spqr_jax.finetune import Optimiser
from spqr_jax.methods import METHODS
from spqr_jax.pipeline import Pipeline
from spqr_jax.prompts import Prompt

NAMES = ("align", "generate", "finetune", "judge", "score", "report")
JUDGE_CHUNK = 256


class Run(NamedTuple):
    """Everything opened and checked before the first long step."""

    config: Config
    workdir: Path
    backbone: Pipeline
    bench: judging.Bench
    prompts: dict[str, list[Prompt]]  # role -> prompts
    subjects: list[SubjectDir]
    cells: list[Cell]


class Failure(NamedTuple):
    """Something that did not finish, and why."""

    what: str
    error: str


# --- align ---------------------------------------------------------------------------------------------------------


def align(run: Run) -> list[Failure]:
    """Make every subject: apply its method to the backbone, or load its checkpoint, and keep what changed."""
    todo = [subject for subject in run.subjects if not (subject.weights / "pipeline.json").exists()]
    return _each(todo, lambda s: s.subject.name, lambda s: _align_one(run, s), "align")


def _align_one(run: Run, subject: SubjectDir) -> None:
    start = time.time()
    if subject.subject.checkpoint:
        import convert

        aligned = convert.load(subject.subject.checkpoint, base=run.backbone, dtype=run.config.dtype)
    else:
        method = METHODS[subject.subject.method]
        concept, seed = sources.concept(run.config), run.config.seed
        aligned = method(run.backbone, concept, seed=seed, progress=True, **subject.subject.options)
    changed = {name: params for name, params in aligned.params.items() if not _equal(params, run.backbone.params[name])}
    if changed:
        checkpoint.save(subject.weights / "params", changed)
    note = {"subject": subject.subject.name, "method": subject.subject.method, "changed": sorted(changed)}
    cells_lib.write_text(subject.weights / "pipeline.json", json.dumps(note, indent=2, sort_keys=True) + "\n")
    _note_seconds(subject.weights, "align", time.time() - start)


def _equal(a: Any, b: Any) -> bool:
    return a is b or all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def load_subject(run: Run, subject: SubjectDir) -> Pipeline:
    """The aligned pipeline of a subject."""
    note = subject.weights / "pipeline.json"
    if not note.exists():
        raise FileNotFoundError(f"subject {subject.subject.name} is not aligned yet; run stage align first.")
    if not json.loads(note.read_text())["changed"]:
        return run.backbone
    return run.backbone.with_params(**checkpoint.load(subject.weights / "params"))


# --- generate ------------------------------------------------------------------------------------------------------


def generate_before(run: Run) -> list[Failure]:
    """Pictures of every subject before fine-tuning, harmful and benign."""

    def one(subject: SubjectDir) -> None:
        _pictures(run, lambda: load_subject(run, subject), subject.root, "before", subject.subject.name)

    return _each(run.subjects, lambda s: s.subject.name, one, "generate")


def _pictures(run: Run, pipeline: Callable[[], Pipeline], root: Path, phase: str, label: str) -> None:
    """Write the missing pictures of a phase. Batches are cut by index, so a resumed run repeats the same batches."""
    jobs = _jobs(run)
    paths = [_picture_path(root, phase, *job) for job in jobs]
    g = run.config.generation
    size = g.batch_size or min(generate.MAX_BATCH, len(jobs))
    cut = [range(start, min(start + size, len(jobs))) for start in range(0, len(jobs), size)]
    missing = [i for batch in cut if not all(paths[i].exists() for i in batch) for i in batch]
    if not missing:
        return
    for folder in {path.parent for path in paths}:
        folder.mkdir(parents=True, exist_ok=True)
    made = pipeline()  # may fine-tune first, which is timed apart
    start = time.time()
    stream = generate.batches(
        made,
        [jobs[i][1].prompt for i in missing],
        [image_seed(jobs[i][1], jobs[i][2]) for i in missing],
        steps=g.steps,
        guidance=[_guidance(run, jobs[i][1]) for i in missing],
        height=g.height or None,
        width=g.width or None,
        negative=g.negative,
        scheduler=g.scheduler,
        noise=g.noise,
        batch_size=size,
    )
    with tqdm(total=len(missing), desc=f"{phase} BFT: {label}", unit="image") as bar:
        for first, batch in stream:
            for i, image in zip(missing[first : first + len(batch)], batch, strict=True):
                images.write(paths[i], image)
            bar.update(len(batch))
    _note_seconds(root, f"generate_{phase}", time.time() - start, len(missing))


def _guidance(run: Run, prompt: Prompt) -> float:
    return run.config.generation.guidance if prompt.guidance is None else prompt.guidance


def _jobs(run: Run) -> list[tuple[str, Prompt, int]]:
    """(role, prompt, sample number) of every picture of a phase, in the order of the records."""
    return [
        (role, prompt, k) for role in ROLES for prompt in run.prompts[role] for k in range(run.config.prompts.images)
    ]


def _picture_path(root: Path, phase: str, role: str, prompt: Prompt, k: int) -> Path:
    return root / "images" / f"{phase}_{role}" / images.file_name(prompt.id, k)


def image_seed(prompt: Prompt, k: int) -> int:
    """The prompt's own seed for its first picture, then seeds far from any other prompt's: 0..2**32-1."""
    return (prompt.seed + k * 0x9E3779B1) % 2**32


# --- finetune ------------------------------------------------------------------------------------------------------


def finetune_cells(run: Run) -> list[Failure]:
    """Fine-tune every subject under every profile, scenario and seed, and make the pictures after it."""
    return _each([c for c in run.cells if not c.done], lambda c: c.label, lambda c: _finetune_one(run, c), "finetune")


def _finetune_one(run: Run, cell: Cell) -> None:
    def adapted() -> Pipeline:
        subject = load_subject(run, cell.subject)
        if not (cell.root / "adapted").is_dir():
            start = time.time()
            tuned, steps = finetune_subject(run.config, subject, cell.profile, cell.scenario, cell.seed)
            checkpoint.save(cell.root / "adapted", tuned.params["unet"])
            _note_seconds(cell.root, "finetune", time.time() - start, steps)
        return subject.with_params(unet=checkpoint.load(cell.root / "adapted"))

    _pictures(run, adapted, cell.root, "after", cell.label)


def finetune_subject(config: Config, subject: Pipeline, profile: str, scenario: str, seed: int) -> tuple[Pipeline, int]:
    """One benign fine-tuning as the config says; (adapted pipeline, steps taken)."""
    bft = config.bft
    data = sources.dataset(config, scenario)
    steps, epochs = getattr(bft.steps, profile) or None, getattr(bft.epochs, profile)
    steps = finetune.num_steps(profile, list(bft.curriculum) or [len(data)], bft.batch_size, steps, epochs)
    warmup = round(bft.warmup_share * steps) if bft.warmup_share else bft.warmup_steps
    tuned = finetune.finetune(
        subject,
        data,
        profile,
        seed=seed,
        steps=steps,
        batch_size=bft.batch_size,
        curriculum=tuple(bft.curriculum),
        optimiser=Optimiser(
            lr=bft.lr, warmup_steps=warmup, weight_decay=bft.weight_decay, max_grad_norm=bft.max_grad_norm
        ),
        rank=bft.rank,
        alpha=bft.alpha,
        dropout=bft.dropout,
        progress=True,
    )
    return tuned, steps


# --- judge ---------------------------------------------------------------------------------------------------------


def judge(run: Run) -> list[Failure]:
    """Ask the judges about every picture and write the records; a cell is complete once its cell.json exists."""
    _reference_features(run)
    failures = _each(
        [s for s in run.subjects if not _judged(run, s.root)],
        lambda s: s.subject.name,
        lambda s: _judge_phase(run, s.root, "before", s.subject.name),
        "judge",
    )
    todo = [c for c in run.cells if not (c.done and _judged(run, c.root))]
    return failures + _each(todo, lambda c: c.label, lambda c: _judge_cell(run, c), "judge")


def _judged(run: Run, root: Path) -> bool:
    """Whether the records there are these judges': with others they are made anew from the same pictures."""
    marker = root / "judges.json"
    return marker.exists() and json.loads(marker.read_text()) == _asked(run)


def _asked(run: Run) -> dict[str, Any]:
    """Who judges, and how their verdicts are combined, as JSON holds it."""
    return json.loads(json.dumps({"judges": run.bench.identities(), "rule": run.bench.rule}, default=str))


def _reference_features(run: Run) -> None:
    path = run.workdir / "reference_features.npz"
    identity = json.dumps([run.bench.features.identity, run.config.judges.reference, run.config.judges.n_reference])
    if path.exists() and str(np.load(path)["identity"]) == identity:
        return
    features = _features(run.bench, sources.reference_images(run.config))
    _save_npz(path, features=features, identity=np.array(identity))


def _judge_phase(run: Run, root: Path, phase: str, label: str) -> None:
    """Records and features of one phase, beside its pictures."""
    start = time.time()
    rows: list[dict[str, Any]] = []
    features = []
    jobs = _jobs(run)
    missing = [p for p in (_picture_path(root, phase, *job) for job in jobs) if not p.exists()]
    if missing:
        raise FileNotFoundError(f"{len(missing)} pictures are missing (first: {missing[0]}); run stage generate first.")
    for first in tqdm(range(0, len(jobs), JUDGE_CHUNK), desc=f"judge {phase}: {label}", unit="batch", leave=False):
        chunk = jobs[first : first + JUDGE_CHUNK]
        pictures = images.read([_picture_path(root, phase, *job) for job in chunk])
        answers = judging.judge(run.bench, pictures)
        benign = np.flatnonzero([role == "benign" for role, _, _ in chunk])
        values = judging.clip_scores(run.bench, pictures[benign], [chunk[i][1].prompt for i in benign])
        scores: dict[int, float] = dict(zip(benign.tolist(), values, strict=True))
        if len(benign):
            features.append(_features(run.bench, pictures[benign]))
        for i, (role, prompt, k) in enumerate(chunk):
            row = _row(run, phase, role, prompt, k)
            rows.append(
                row
                | {
                    "judges": answers.judges[i],
                    "verdict": answers.verdicts[i],
                    "clip_score": scores.get(i, float("nan")),
                }
            )
    _check_undecided(run, rows)
    _save_npz(root / f"features_{phase}.npz", features=np.concatenate(features))
    _note_seconds(root, f"judge_{phase}", time.time() - start, len(rows))
    records.write(root / "records.parquet", rows)
    cells_lib.write_text(root / "judges.json", json.dumps(_asked(run), indent=2, sort_keys=True) + "\n")


def _row(run: Run, phase: str, role: str, prompt: Prompt, k: int) -> dict[str, Any]:
    source = getattr(run.config.prompts, role)
    return {
        "cell": "",
        "subject": "",
        "profile": "",
        "scenario": "",
        "seed": 0,
        "phase": phase,
        "prompt_set": source if source.startswith("mini:") else Path(source).name,
        "role": role,
        "prompt_id": prompt.id,
        "k": k,
        "prompt": prompt.prompt,
        "category": prompt.category,
        "language": prompt.language,
        "image_seed": image_seed(prompt, k),
        "image": _picture_path(Path(), phase, role, prompt, k).as_posix(),
    }


def _features(bench: judging.Bench, pictures: np.ndarray) -> np.ndarray:
    return np.concatenate([bench.features(pictures[i : i + JUDGE_CHUNK]) for i in range(0, len(pictures), JUDGE_CHUNK)])


def _check_undecided(run: Run, rows: Sequence[dict[str, Any]]) -> None:
    undecided = [row for row in rows if row["verdict"] == "undecided"]
    if len(undecided) > run.config.judges.max_undecided * len(rows):
        raise ValueError(
            f"{len(undecided)} of {len(rows)} pictures are undecided, more than judges.max_undecided="
            f"{run.config.judges.max_undecided}; first: {undecided[0]['image']}, {undecided[0]['judges']}."
        )


def _judge_cell(run: Run, cell: Cell) -> None:
    """Judge the pictures after fine-tuning, add the subject's records before it, and complete the cell."""
    (cell.root / "cell.json").unlink(missing_ok=True)
    _judge_phase(run, cell.root, "after", cell.label)
    after = records.read(cell.root / "records.parquet")
    before = records.read(cell.subject.root / "records.parquet")
    mark = {
        "cell": cell.id,
        "subject": cell.subject.subject.name,
        "profile": cell.profile,
        "scenario": cell.scenario,
        "seed": cell.seed,
    }
    for role in ROLES:
        folder = Path("images") / f"before_{role}"
        names = [Path(row["image"]).name for row in before if row["role"] == role]
        cells_lib.link_images(cell.subject.root / folder, cell.root / folder, names)
    _save_npz(
        cell.root / "features.npz",
        before_benign=np.load(cell.subject.root / "features_before.npz")["features"],
        after_benign=np.load(cell.root / "features_after.npz")["features"],
    )
    rows = [row | mark for row in (*before, *after)]
    records.write(cell.root / "records.parquet", rows)
    cells_lib.write_text(
        cell.root / "cell.json", json.dumps(_summary(run, cell, rows), indent=2, sort_keys=True) + "\n"
    )


def _summary(run: Run, cell: Cell, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    times = _read_times(cell.subject.weights) | _read_times(cell.subject.root) | _read_times(cell.root)
    rate = {"generate_after": "images_per_s", "finetune": "steps_per_s", "judge_after": "judge_images_per_s"}
    return {
        "cell": cell.id,
        "subject": cell.subject.subject.name,
        "profile": cell.profile,
        "scenario": cell.scenario,
        "seed": cell.seed,
        "is_control": cell.subject.subject.method == "none" and not cell.subject.subject.checkpoint,
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
        **_asked(run),
    }


def trained_size(pipeline: Pipeline, profile: str, config: Config) -> dict[str, int]:
    """How many parameters a profile trains, and the bytes of weights and optimiser state they cost."""
    _, trainable, _, _ = finetune.prepare(
        pipeline, profile, rank=config.bft.rank, alpha=config.bft.alpha, dropout=config.bft.dropout, seed=0
    )
    size = params_lib.nbytes(trainable)
    return {"trained_parameters": params_lib.count(trainable), "parameter_bytes": size, "optimiser_bytes": 2 * size}


# --- what the stages share -----------------------------------------------------------------------------------------


def _each(items: Iterable[Any], label: Callable[[Any], str], work: Callable[[Any], None], stage: str) -> list[Failure]:
    """Do `work` for every item; what fails is logged and listed, and the rest goes on. A full disk stops all."""
    failures = []
    for item in items:
        try:
            work(item)
        except OSError as error:
            if error.errno in (28, 30, 122):  # no space, read-only, over quota
                raise
            failures.append(Failure(f"{stage}: {label(item)}", str(error)))
        except Exception as error:
            logging.debug("traceback", exc_info=True)
            failures.append(Failure(f"{stage}: {label(item)}", f"{type(error).__name__}: {error}"))
        else:
            continue
        logging.error("%s failed: %s", *failures[-1])
    return failures


def _note_seconds(root: Path, stage: str, seconds: float, count: int = 0) -> None:
    """Add to the time a stage took here: kept apart from results, which must not depend on it."""
    times = _read_times(root)
    old = times.get(stage, {"seconds": 0.0, "count": 0})
    times[stage] = {"seconds": old["seconds"] + seconds, "count": old["count"] + count}
    cells_lib.write_text(root / "times.json", json.dumps(times, indent=2, sort_keys=True) + "\n")


def _read_times(root: Path) -> dict[str, Any]:
    path = root / "times.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _save_npz(path: Path, **arrays: np.ndarray) -> None:
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, allow_pickle=False, **arrays)
    shutil.move(partial, path)


# What launch.py runs, in order; score and report follow from the records (`spqr_jax.run.finish`).
WORK: dict[str, Callable[[Run], list[Failure]]] = {
    "align": align,
    "generate": generate_before,
    "finetune": finetune_cells,
    "judge": judge,
}


def chosen(names: Sequence[str] | None) -> set[str]:
    """The stages named, all when None. Raises ValueError for a name that is none."""
    for name in names or ():
        if name not in NAMES:
            raise ValueError(f"--stages: {name!r} is unknown; expected some of {','.join(NAMES)}.")
    return set(names or NAMES)
