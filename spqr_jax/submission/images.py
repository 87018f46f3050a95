"""The records of a submission: every image that its config asks for, once, with the verdict of its judges' answers."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from judges import combine, recorded
from spqr_jax.config import Config
from spqr_jax.files import images as images_lib
from spqr_jax.files import records
from spqr_jax.files.layout import ImagesFolder
from spqr_jax.files.records import PHASES, ROLES
from spqr_jax.prompts import Prompt
from spqr_jax.run import bft, names
from spqr_jax.run.stages.pictures import image_seed
from spqr_jax.submission import places, stated
from spqr_jax.submission.bundle import Bundle, BundledCell
from spqr_jax.submission.places import shown
from spqr_jax.submission.stated import config_of

Row = Mapping[str, Any]
MEASURED = ("judges", "verdict", "clip_score")  # columns that an image decides; the config decides the others
OF_CELL = ("cell", "subject", "profile", "scenario", "seed")
VERDICTS = ("safe", "unsafe", "undecided")
FLIPS = 0.02  # share of verdicts that rounding may change: some images lie on the border


def faults(bundle: Bundle) -> list[str]:
    """Everything in which the records and features of a bundle contradict its config, its judges or each other.

    The config of the manifest must be sound (`stated.manifest_faults`). Of each kind in each cell the first is named.
    """
    config = config_of(bundle.manifest)
    found = [line for cell in bundle.cells for line in _cell_faults(bundle, config, cell)]
    return [*found, *_shared_faults(bundle), *_reference_faults(bundle, config)]


def _cell_faults(bundle: Bundle, config: Config, cell: BundledCell) -> Iterator[str]:
    where = f"cells/{cell.name}/records.parquet"
    rows = cell.records.to_pylist()
    n_asked = len(PHASES) * config.prompts.images * sum(len(stated["prompts"]) for stated in bundle.prompts.values())
    if len(rows) != n_asked:
        yield f"{where}: {len(rows):,} images, the config asks for {n_asked:,}"
    for i, (row, expected) in enumerate(zip(rows, _asked(bundle, config, cell), strict=False)):
        if wrong := [name for name, value in expected.items() if row[name] != value]:
            name = wrong[0]
            yield f"{where}: row {i}: {name} is {shown(repr(row[name]))}, expected {shown(repr(expected[name]))}"
            break
    for phase in PHASES:
        own = [row["verdict"] for row in rows if row["phase"] == phase]
        if (n := own.count("undecided")) > config.judges.max_undecided * len(own):
            yield f"{where}: {n} images {phase} are undecided, more than judges.max_undecided allows"
    for i, row in enumerate(rows):
        if fault := _answer_fault(bundle, config, row):
            yield f"{where}: row {i} ({row['phase']}, {row['role']}, prompt {shown(row['prompt_id'])}): {fault}"
            break
    n = config.prompts.n_benign * config.prompts.images
    for phase in PHASES:
        array = cell.features[f"{phase}_benign"]
        if len(array) != n:
            yield f"cells/{cell.name}/features.npz: {phase}_benign has {len(array)} rows, expected {n}"
    yield from _drift_faults(bundle, config, cell)


def _asked(bundle: Bundle, config: Config, cell: BundledCell) -> Iterator[dict[str, Any]]:
    """What the config decides about each image of a cell, in the order of the records."""
    own = {name: cell.info[name] for name in OF_CELL}
    return (
        {**own, "phase": phase, "role": role, "k": k, **_of_prompt(bundle.prompts[role]["set"], row, phase, role, k)}
        for phase in PHASES
        for role in ROLES
        for row in bundle.prompts[role]["prompts"]
        for k in range(config.prompts.images)
    )


def _of_prompt(prompt_set: str, row: Row, phase: str, role: str, k: int) -> dict[str, Any]:
    prompt = Prompt(row["id"], "", seed=row["seed"])
    image = ImagesFolder(Path()).images(phase, role) / images_lib.file_name(prompt.id, k)
    return {
        "prompt_set": prompt_set,
        "prompt_id": row["id"],
        "prompt": row["sha256"],
        "category": row["category"],
        "language": row["language"],
        "image_seed": image_seed(prompt, k),
        "image": image.as_posix(),
    }


def _answer_fault(bundle: Bundle, config: Config, row: Row) -> str:
    """The first thing that is wrong with the answers about one image, "" if nothing is."""
    try:
        answers = json.loads(row["judges"])
        canonical = json.dumps(answers, sort_keys=True, allow_nan=False)
    except (ValueError, RecursionError):
        return "judges is no JSON"
    if canonical != row["judges"] or not isinstance(answers, dict):
        return "judges is not in the form that a run writes"
    if set(answers) != set(config.judges.safety):
        return f"answers of {shown(str(sorted(answers)))}, the judges are {sorted(config.judges.safety)}"
    for name, answer in answers.items():
        judge = bundle.manifest["judges"][name]
        if recorded.knows(judge):
            if fault := recorded.fault(answer, judge):
                return f"{name}: {shown(fault)}"
        elif not isinstance(answer, dict) or answer.get("verdict") not in VERDICTS:
            return f"{name}: no verdict"
    verdict = combine.combine({name: [a["verdict"]] for name, a in answers.items()}, config.judges.rule)[0]
    if row["verdict"] != verdict:
        return f"verdict is {shown(row['verdict'])}, its judges' answers give {verdict}"
    cosine = row["clip_score"]
    if row["role"] == "harmful" and not math.isnan(cosine):
        return "clip_score is not computed for harmful prompts"
    return "" if math.isnan(cosine) or -1 - 1e-6 <= cosine <= 1 + 1e-6 else f"clip_score {cosine} is no cosine"


def _drift_faults(bundle: Bundle, config: Config, cell: BundledCell) -> Iterator[str]:
    where = f"cells/{cell.name}/drift.parquet"
    try:
        last = bft.num_steps(config.bft, cell.info["profile"], config.bft.samples)
    except stated.NO_STEPS:
        return  # `stated.faults` names it
    steps = sorted({0, *(step for step in config.bft.eval_at if step <= last)})
    if (cell.drift is not None) != bool(config.bft.eval_at):
        yield f"{where}: {'is missing' if cell.drift is None else 'is there, and the config measures no drift'}"
    if cell.drift is None:
        return
    prompts = bundle.prompts["harmful"]["prompts"][: config.bft.eval_prompts or None]
    same = {"role": "harmful", "prompt_set": bundle.prompts["harmful"]["set"], "k": 0}
    asked = (
        {"step": step, **same, "prompt_id": row["id"], "category": row["category"]} for step in steps for row in prompts
    )
    rows = cell.drift.to_pylist()
    if len(rows) != len(steps) * len(prompts):
        yield f"{where}: {len(rows):,} images, the config asks for {len(steps) * len(prompts):,}"
    for i, (row, expected) in enumerate(zip(rows, asked, strict=False)):
        wrong = [name for name, value in expected.items() if row[name] != value]
        wrong += [] if row["verdict"] in VERDICTS else ["verdict"]
        if wrong:
            yield f"{where}: row {i}: {wrong[0]} is {shown(repr(row[wrong[0]]))}"
            return
    yield from _drift_ends_faults(cell, rows, last, where)


def _drift_ends_faults(cell: BundledCell, rows: list[Row], last: int, where: str) -> Iterator[str]:
    """Step 0 has the model that the images before are of, and the last step the one of those after.

    The same noise gives the same images but for rounding, since a batch of another size is another program.
    """
    images = [row for row in cell.records.to_pylist() if row["role"] == "harmful" and row["k"] == 0]
    for step, phase in {last: "after", 0: "before"}.items():
        own = {row["prompt_id"]: row["verdict"] for row in images if row["phase"] == phase}
        drawn = {row["prompt_id"]: row["verdict"] for row in rows if row["step"] == step}
        if (n := sum(own.get(id) != verdict for id, verdict in drawn.items())) > FLIPS * len(drawn):
            yield f"{where}: {n} of {len(drawn)} verdicts at step {step} are others than those of the images {phase}"


def _shared_faults(bundle: Bundle) -> Iterator[str]:
    """The cells of a subject share the images before fine-tuning, so their records and features are the same."""
    first: dict[str, tuple[BundledCell, list[Row]]] = {}
    columns = [name for name in records.IMAGES.schema.names if name not in OF_CELL]
    for cell in bundle.cells:
        rows = [row for row in cell.records.select(columns).to_pylist() if row["phase"] == "before"]
        other, theirs = first.setdefault(cell.info["subject"], (cell, rows))
        if [str(row) for row in rows] != [str(row) for row in theirs]:  # as text, where NaN equals NaN
            yield f"cells/{cell.name}/records.parquet: other images before fine-tuning than {other.name} has"
        if not np.array_equal(cell.features["before_benign"], other.features["before_benign"]):
            yield f"cells/{cell.name}/features.npz: other features before fine-tuning than {other.name} has"


def _reference_faults(bundle: Bundle, config: Config) -> Iterator[str]:
    """The features of images and of the reference come from one network, and the reference is the config's."""
    if bundle.reference is None:
        return
    mu, sigma = bundle.reference["mu"], bundle.reference["sigma"]
    if sigma.shape != (len(mu), len(mu)) or not np.array_equal(sigma, sigma.T):
        yield f"{places.REFERENCE}: sigma must be symmetric, as wide as mu"
    try:
        network, images = json.loads(str(bundle.reference["identity"]))
        canonical = json.dumps([network, images]) == str(bundle.reference["identity"])
    except (ValueError, RecursionError, TypeError):
        network, images, canonical = None, "", False
    if not canonical or network != bundle.manifest["judges"]["features"]:
        yield f"{places.REFERENCE}: its identity is not that of the run's feature network"
    n, shipped = config.judges.n_reference, config.judges.reference == names.REFERENCE
    expected = names.reference_identity(config) if shipped else f"{n} pictures of "
    if images != expected if shipped else not str(images).startswith(expected):
        yield f"{places.REFERENCE}: its images are {shown(str(images))}, the config names {shown(expected)}"
    for cell in bundle.cells:
        if any(array.shape[1] != len(mu) for array in cell.features.values()):
            yield f"cells/{cell.name}/features.npz: another width than the {len(mu)} of the reference"
