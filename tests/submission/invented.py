"""A finished work directory with invented answers and features: every file as a run writes it, without its images.

Prompts, hashes, ids, judges' identities and file formats are those of the emoji world; only what images would have
shown is drawn. `bundle` makes a submission of it with the code that users call.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from configs import mini
from judges.classifier import Decision, decide
from judges.sidecar import read_sidecar
from spqr_jax import protocols
from spqr_jax.config import Config, Subject
from spqr_jax.files import images, records, storage
from spqr_jax.files.layout import Workdir
from spqr_jax.files.records import PHASES, ROLES
from spqr_jax.mini import judge_path, model_path
from spqr_jax.run import bft, jury, manifest, names, protocol
from spqr_jax.run.cells import Cell, plan
from spqr_jax.run.identity import Inputs, digest
from spqr_jax.run.stages.pictures import image_seed
from spqr_jax.score import leaderboard
from spqr_jax.submission import bundle as bundle_lib
from spqr_jax.submission import pack

WIDTH = 8  # of features
DRIFT_AT = 4  # steps of fine-tuning after which harm is measured, besides 0
SUBJECTS = ("No alignment", "UCE", "RECE")


def config(
    subjects=SUBJECTS, profiles=("lite",), seeds=(42,), n_harmful=12, n_benign=8, images=1, drift=False
) -> Config:
    """The emoji world's config with few prompts. A subject's method is its name in small letters, or its own."""
    made = mini.get_config()
    methods = {subject.name: subject for subject in made.subjects}
    made.subjects = tuple(methods.get(name, Subject(name, "uce", {"ridge": 0.5})) for name in subjects)
    made.prompts.n_harmful, made.prompts.n_benign, made.prompts.images = n_harmful, n_benign, images
    made.judges.n_reference, made.bft.profiles, made.bft.seeds = 64, profiles, seeds
    made.score.replicates = 100
    made.bft.eval_at = (DRIFT_AT,) if drift else ()
    return protocol.resolve(made)


@lru_cache(maxsize=1)
def identities() -> dict[str, Any]:
    return jury.open_jury(protocol.resolve(mini.get_config()).judges).identities()


@lru_cache(maxsize=1)
def backbone() -> str:
    return storage.sha256(model_path())


def run(workdir: Path, made: Config | None = None, *, draw: int = 0) -> Path:
    """Write the work directory of a finished run and return it. draw: seed of what its images would have shown."""
    made = config() if made is None else made
    rng = np.random.default_rng(draw)
    prompts = {role: names.prompts(made, role) for role in ROLES}
    inputs = Inputs(
        backbone=backbone(),
        prompts={role: digest(rows) for role, rows in prompts.items()},
        data={scenario: f"mini:{scenario} {made.bft.samples} {made.seed}" for scenario in made.bft.scenarios},
        checkpoints={},
    )
    subjects, cells = plan(made, workdir, inputs)
    before = {s.id: _phase(made, prompts, "before", 0.5 if s.is_control else 0.1 + 0.1 * i, rng)
              for i, s in enumerate(subjects)}  # fmt: skip
    for cell in cells:
        _cell(made, cell, before[cell.subject.id], _phase(made, prompts, "after", 0.6, rng))
    reference = rng.normal(0.0, 1.0, (64, WIDTH)).astype(np.float32)
    identity = json.dumps([identities()["features"], names.reference_identity(made)])
    storage.write_npz(Workdir(workdir).reference_features, features=reference, identity=np.array(identity))
    opened: Any = _Opened(made, workdir, inputs)
    manifest.write_manifest(opened, ["launch.py", "--config", "configs/mini.py"])
    board = leaderboard.build(workdir, section=vars(made.score), replicates=made.score.replicates)
    leaderboard.write(workdir, board)
    return workdir


def bundle(folder: Path, made: Config | None = None, **options: Any) -> Path:
    """The directory of a submission: `folder`/bundle, of the run in `folder`/run."""
    return bundle_lib.write(pack.of_run(run(folder / "run", made, **options)), folder / "bundle")


class _Opened:
    """What `write_manifest` reads of an opened run."""

    def __init__(self, made: Config, workdir: Path, inputs: Inputs):
        self.config, self.workdir, self.inputs, self.jury = made, workdir, inputs, self

    def identities(self) -> dict[str, Any]:
        return identities()


def _decision() -> Decision:
    options = identities()["harm"]["options"]
    sidecar = read_sidecar(judge_path("harm").with_suffix(".json"))
    labels = tuple(sidecar["labels"])
    unsafe = tuple(labels.index(label) for label in options["unsafe"])
    return Decision(labels, unsafe, "softmax", options["rule"], options["threshold"])


def _phase(made: Config, prompts: dict[str, Any], phase: str, harm: float, rng: np.random.Generator) -> dict[str, Any]:
    """The rows and features of one phase. harm: about the share of unsafe images."""
    decision, rows = _decision(), []
    for role in ROLES:
        for prompt in prompts[role]:
            for k in range(made.prompts.images):
                outputs = rng.normal(0.0, 1.0, len(decision.labels))
                hit = rng.random() < (harm if role == "harmful" else 0.02)
                outputs[decision.unsafe[rng.integers(len(decision.unsafe))]] += 6.0 if hit else -3.0
                answer = decide(outputs, decision)
                rows.append(
                    {
                        "phase": phase, "prompt_set": names.prompt_set(made, role), "role": role,
                        "prompt_id": prompt.id, "k": k, "prompt": prompt.prompt, "category": prompt.category,
                        "language": prompt.language, "image_seed": image_seed(prompt, k),
                        "image": f"images/{phase}_{role}/{images.file_name(prompt.id, k)}",
                        "judges": json.dumps({"harm": answer.as_dict()}, sort_keys=True),
                        "verdict": answer.verdict,
                        "clip_score": float(rng.uniform(0.2, 0.4)) if role == "benign" else float("nan"),
                    }
                )  # fmt: skip
    n = len(prompts["benign"]) * made.prompts.images
    return {"rows": rows, "features": rng.normal(0.1, 1.1, (n, WIDTH)).astype(np.float32)}


def _cell(made: Config, cell: Cell, before: dict[str, Any], after: dict[str, Any]) -> None:
    mark = {"cell": cell.id, "subject": cell.subject.name, "profile": cell.profile, "scenario": cell.scenario}
    mark["seed"] = cell.seed
    rows = [row | mark for phase in (before, after) for row in phase["rows"]]
    records.write(cell.folder.records, rows)
    storage.write_npz(cell.folder.features, before_benign=before["features"], after_benign=after["features"])
    if made.bft.eval_at:
        columns = ("role", "prompt_set", "prompt_id", "k", "category", "verdict")
        curve = [
            {"step": step} | {name: row[name] for name in columns}
            for step, phase in zip((0, DRIFT_AT), PHASES, strict=True)
            for row in {"before": before, "after": after}[phase]["rows"]
            if row["role"] == "harmful" and row["k"] == 0
        ]
        records.write(cell.folder.drift, curve, records.DRIFT)
    steps = bft.num_steps(made.bft, cell.profile, made.bft.samples)
    stated = protocols.of_cell(protocol.statement(made), cell.profile)._asdict()
    info = mark | {"is_control": cell.subject.is_control, "backbone": "sd", "protocol": stated}
    info |= {"judges": identities(), "rule": made.judges.rule, "finetune": {"steps": steps, "trained_parameters": 1000}}
    info |= {"n_undecided": 0, "seconds": {"finetune": 1.5}, "rates": {"steps_per_s": 2.0}}
    storage.write_text(cell.folder.summary, json.dumps(info, indent=2, sort_keys=True) + "\n")
