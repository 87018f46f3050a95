"""Finished work directories of any number of cells and prompts, with invented answers: what `benchmarks.growth` scores.

`tests.submission.invented` writes every file of a run of the emoji world, which has 1,440 harmful prompts, picture by
picture. Here are the files that scores and reports are computed from, whole columns at a time, so that 300 cells of
10,000 prompts are there in a minute. Every cell has answers and features of its own; images before fine-tuning are
those of the subject, as in a run.
"""

import json
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from spqr_jax.files import images, records, storage
from spqr_jax.files.layout import CellFolder, Workdir
from spqr_jax.files.records import PHASES, ROLES

PROFILES = ("lite", "moderate", "standard")
SCENARIOS = ("general", "multilingual_ar", "artistic", "medical")
CATEGORIES = ("nudity", "violence", "hate", "drugs", "weapons", "blood", "insults")
JUDGES = ("classifier", "detector")
WIDTH, REFERENCES = 128, 1000  # of the emoji world: features of an image, reference images
PICTURES = 64  # distinct ones


class Place(NamedTuple):
    """Where a cell stands in a sweep."""

    subject: str
    profile: str
    scenario: str
    is_control: bool

    @property
    def id(self) -> str:
        """The name of its directory."""
        return f"{self.subject}-{self.profile}-{self.scenario}-0".replace(" ", "-").lower()


class Phase(NamedTuple):
    """Answers about the images of one phase, those of harmful prompts first: [N] each, and features [N/2, WIDTH]."""

    unsafe: NDArray[np.bool_]
    answers: list[str]
    clip: NDArray[np.float64]
    features: NDArray[np.float32]


def sweep(cells: int, each: int = len(PROFILES) * len(SCENARIOS)) -> list[Place]:
    """The cells of a sweep, so many for each subject: scenarios, then profiles. The first subject is the control."""
    names = ("No alignment", *(f"Method {i}" for i in range(1, -(-cells // each))))
    places = list(product(PROFILES, SCENARIOS))[:each]
    return [Place(s, profile, scenario, s == names[0]) for s in names for profile, scenario in places][:cells]


def write(workdir: Path, *, cells: int, prompts: int, each: int = 12, pictures: bool = False) -> Path:
    """Write the work directory of a finished sweep without its leaderboard, and return it.

    prompts: half of them harmful, one image each in a phase. each: cells of a subject. pictures: whether the images are
    there, each one of PICTURES of the emoji world's size. The same arguments write the same records.
    """
    asked, rng = prompt_columns(prompts), np.random.default_rng(prompts)
    before: dict[str, Phase] = {}
    for number, place in enumerate(sweep(cells, each)):
        harm = 0.9 if place.is_control else 0.1 + 0.3 * rng.random()
        if place.subject not in before:
            before[place.subject] = answered(asked, harm, rng)
        folder = Workdir(workdir).cell(place.id)
        phases = (before[place.subject], answered(asked, min(0.95, harm + 0.1 * rng.random()), rng))
        write_cell(folder, place, asked, phases)
        if pictures:
            link_pictures(workdir, folder, asked, number)
    reference = rng.normal(0.0, 1.0, (REFERENCES, WIDTH)).astype(np.float32)
    storage.write_npz(Workdir(workdir).reference_features, features=reference)
    storage.write_text(Workdir(workdir).manifest, json.dumps({"config": {}, "versions": {"numpy": np.__version__}}))
    return workdir


def prompt_columns(prompts: int) -> dict[str, list[Any]]:
    """The columns of records.parquet that say which image a row is about, for one phase."""
    half = prompts // 2
    number, kind = [i for _ in ROLES for i in range(half)], [role for role in ROLES for _ in range(half)]
    harmful = [role == ROLES[0] for role in kind]
    return {
        "prompt_set": [f"invented_{role}" for role in kind],
        "role": kind,
        "prompt_id": [str(i) for i in number],
        "k": [0] * len(kind),
        "prompt": [f"a photograph of object {i} on a table, {role}" for i, role in zip(number, kind, strict=True)],
        "category": [CATEGORIES[i % len(CATEGORIES)] if h else "" for i, h in zip(number, harmful, strict=True)],
        "language": ["en"] * len(kind),
        "image_seed": [7 * i + 1 for i in number],
    }


def answered(asked: dict[str, list[Any]], harm: float, rng: np.random.Generator) -> Phase:
    """Answers of two judges, which differ in one of twenty images; an image is unsafe if one of them says so."""
    n, half = len(asked["role"]), len(asked["role"]) // 2
    shares = np.where(np.arange(n) < half, harm, 0.02)
    scores = np.stack([shares > rng.random(n)] * len(JUDGES)) ^ (rng.random((len(JUDGES), n)) < 0.05)
    numbers = np.round(rng.random((len(JUDGES), n)) / 2 + 0.5 * scores, 6).tolist()
    words = np.where(scores, "unsafe", "safe").tolist()
    answers = [
        f'{{"{JUDGES[0]}": {{"labels": {{"safe": {1 - a:.4f}, "weapons": {a:.4f}}}, "reason": "", "score": {a}, '
        f'"verdict": "{v}"}}, "{JUDGES[1]}": {{"detections": [], "reason": "", "score": {b}, "verdict": "{w}"}}}}'
        for a, b, v, w in zip(*numbers, *words, strict=True)
    ]
    clip = np.where(np.arange(n) < half, np.nan, rng.uniform(0.2, 0.4, n))
    features = rng.normal(0.1 * rng.random(), 1.0 + 0.1 * rng.random(), (n - half, WIDTH)).astype(np.float32)
    return Phase(scores.any(axis=0), answers, clip, features)


def write_cell(folder: CellFolder, place: Place, asked: dict[str, list[Any]], phases: tuple[Phase, Phase]) -> None:
    """Write records, features and cell.json of one cell. phases: before and after."""
    n = len(asked["role"])
    mark: dict[str, Any] = {
        "cell": folder.name,
        **{name: getattr(place, name) for name in ("subject", "profile", "scenario")},
    }
    mark["seed"] = 0
    paths = [f"{role}/{images.file_name(id, 0)}" for role, id in zip(asked["role"], asked["prompt_id"], strict=True)]
    columns = {name: [value] * (2 * n) for name, value in mark.items()}
    columns |= {name: values * 2 for name, values in asked.items()}
    columns |= {
        "phase": [phase for phase in PHASES for _ in range(n)],
        "image": [f"images/{phase}_{path}" for phase in PHASES for path in paths],
        "judges": [answer for phase in phases for answer in phase.answers],
        "verdict": np.where(np.concatenate([phase.unsafe for phase in phases]), "unsafe", "safe").tolist(),
        "clip_score": np.concatenate([phase.clip for phase in phases]),
    }
    schema = records.IMAGES.schema
    records.write_table(folder.records, pa.table({name: columns[name] for name in schema.names}, schema=schema))
    named = {f"{name}_benign": phase.features for name, phase in zip(PHASES, phases, strict=True)}
    storage.write_npz(folder.features, **named)
    info = mark | {"is_control": place.is_control, "backbone": "sd", "protocol": {"name": "spqr-jax", "changed": {}}}
    info |= {"judges": {name: {"sha256": name} for name in JUDGES}, "rule": "union", "n_undecided": 0}
    info |= {"seconds": {"finetune": 100.0}, "rates": {"steps_per_s": 2.0}}
    storage.write_text(folder.summary, json.dumps(info, indent=2, sort_keys=True))


def link_pictures(workdir: Path, folder: CellFolder, asked: dict[str, list[Any]], first: int) -> None:
    """Give every image of a cell its file: a further name of one of PICTURES."""
    made = workdir / "pictures"
    if not made.exists():
        noise = np.random.default_rng(0).integers(0, 256, (PICTURES, 8, 8, 3), np.uint8).repeat(4, 1).repeat(4, 2)
        for i, picture in enumerate(noise):
            images.write(made / f"{i}.png", picture)
    for phase in PHASES:
        for i, (role, id) in enumerate(zip(asked["role"], asked["prompt_id"], strict=True)):
            target = folder.images(phase, role) / images.file_name(id, 0)
            storage.link(made / f"{(i + first) % PICTURES}.png", target)
