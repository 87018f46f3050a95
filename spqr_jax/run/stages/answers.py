"""The judges' answers about images, as records hold them: what the judging of phases, attacks and probes shares."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from spqr_jax import backbones
from spqr_jax.devices import preemption
from spqr_jax.files import images, records, storage
from spqr_jax.files.layout import ImagesFolder
from spqr_jax.run import names
from spqr_jax.run.cells import Model
from spqr_jax.run.stages.pictures import Job, image_seed, picture_path
from spqr_jax.run.stages.state import Run

JUDGE_CHUNK = 256


def judged(run: Run, folder: ImagesFolder) -> bool:
    """Whether whole records by these judges are there. Other judges' records are made anew from the same images."""
    marker = folder.judged_by
    try:
        if not marker.exists() or json.loads(marker.read_text(encoding="utf-8")) != asked(run):
            return False
        records.read(folder.records)
    except ValueError as error:
        storage.set_aside(folder.records, str(error))
        return False
    return True


def asked(run: Run) -> dict[str, Any]:
    """The judges and the rule that combines their verdicts, as JSON holds them."""
    return json.loads(json.dumps({"judges": run.jury.identities(), "rule": run.jury.rule}, default=str))


def read_chunks(
    folder: ImagesFolder, phase: str, jobs: list[Job], label: str
) -> Iterator[tuple[list[Job], np.ndarray]]:
    """The images of jobs as judges are asked about them: jobs and images_u8. Raises FileNotFoundError if some are not
    drawn."""
    paths = [picture_path(folder, phase, *job) for job in jobs]
    missing = [path for path in paths if not path.exists()]
    if missing:
        raise FileNotFoundError(f"{len(missing)} pictures are missing (first: {missing[0]}); run stage generate first.")
    for first in tqdm(range(0, len(jobs), JUDGE_CHUNK), desc=f"judge {phase}: {label}", unit="batch", leave=False):
        preemption.exit_if_asked_here()
        chunk = slice(first, first + JUDGE_CHUNK)
        yield jobs[chunk], images.read(paths[chunk])


class Answer(NamedTuple):
    """What the judges said about one image, as its record holds it."""

    judges: str
    verdict: str
    clip_score: float


def ask(run: Run, jobs: Sequence[Job], pictures: np.ndarray) -> list[Answer]:
    """The answers about each job's image, pictures uint8 [N, H, W, 3]. Images of benign prompts get a CLIPScore."""
    benign = benign_of(jobs)
    answers = run.jury.ask(pictures)
    values = run.jury.clip_scores(pictures[benign], [jobs[i][1].prompt for i in benign])
    scores: dict[int, float] = dict(zip(benign.tolist(), values, strict=True))
    return [
        Answer(raw, verdict, scores.get(i, float("nan")))
        for i, (raw, verdict) in enumerate(zip(answers.judges, answers.verdicts, strict=True))
    ]


def benign_of(jobs: Sequence[Job]) -> np.ndarray:
    """The numbers of the jobs that draw benign prompts."""
    return np.flatnonzero([role == "benign" for role, _, _ in jobs])


def record(run: Run, phase: str, subject: str, job: Job, answer: Answer) -> records.Record:
    """The row of one image, before it is known which cell it belongs to."""
    role, prompt, k = job
    return records.Record(
        cell="",
        subject=subject,
        profile="",
        scenario="",
        seed=0,
        phase=phase,
        prompt_set=names.prompt_set(run.config, role),
        role=role,
        prompt_id=prompt.id,
        k=k,
        prompt=prompt.prompt,
        category=prompt.category,
        language=prompt.language,
        image_seed=image_seed(prompt, k),
        image=picture_path(ImagesFolder(Path()), phase, role, prompt, k).as_posix(),
        judges=answer.judges,
        verdict=answer.verdict,
        clip_score=answer.clip_score,
    )


def write(run: Run, folder: ImagesFolder, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the records of a folder, and then whose answers they hold."""
    records.write(folder.records, rows)
    storage.write_text(folder.judged_by, json.dumps(asked(run), indent=2, sort_keys=True) + "\n")


def about(run: Run, model: Model, folder: ImagesFolder, jobs: list[Job], label: str) -> list[records.Record]:
    """The records of jobs whose images a model drew into a folder. Raises as `read_chunks` and `check_undecided`."""
    rows: list[records.Record] = []
    for chunk, pictures in read_chunks(folder, model.phase, jobs, label):
        answers = zip(chunk, ask(run, chunk, pictures), strict=True)
        rows += [record(run, model.phase, model.subject.name, job, answer) for job, answer in answers]
    check_undecided(run, rows)
    return rows


def about_model(run: Run, model: Model) -> dict[str, Any]:
    """The entries of a summary that say whose images were judged, and by which judges."""
    return {
        **model.columns,
        "subject": model.subject.name,
        "subject_id": model.subject.id,
        "is_control": model.subject.is_control,
        "phase": model.phase,
        "backbone": backbones.of(run.backbone).key,
        **asked(run),
    }


def check_undecided(run: Run, rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError if the judges could not decide about more of these images than the config allows."""
    undecided = [row for row in rows if row["verdict"] == "undecided"]
    if len(undecided) > run.config.judges.max_undecided * len(rows):
        raise ValueError(
            f"{len(undecided)} of {len(rows)} pictures are undecided, more than judges.max_undecided="
            f"{run.config.judges.max_undecided}; first: {undecided[0]['image']}, {undecided[0]['judges']}."
        )
