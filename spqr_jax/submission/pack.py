"""A finished run as a submission: `python -m spqr_jax.report submit RUN --out DIR`."""

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from spqr_jax import score
from spqr_jax.files import records, storage
from spqr_jax.files.layout import CellFolder, Workdir
from spqr_jax.files.records import ROLES
from spqr_jax.prompts import Prompt
from spqr_jax.run import names
from spqr_jax.run.identity import digest
from spqr_jax.submission import scores, stated
from spqr_jax.submission.bundle import Arrays, Bundle, BundledCell
from spqr_jax.submission.documents import sha256_of_text


def of_run(workdir: str | os.PathLike[str], clear: Collection[str] = ()) -> Bundle:
    """The submission of a finished run.

    clear: names of prompt sets, as records have them, whose licence allows that their texts are published. The emoji
    world's own sets always are. The texts of all others stay out; their sha256 is in. The prompt files must be at hand.

    Raises FileNotFoundError for a run without a manifest, a complete cell, or its prompt files; ValueError for one that
    lacks a cell of its config, holds others, or was scored by other code.
    """
    folder = Workdir(storage.directory(workdir))
    manifest = _json(folder.manifest)
    config = stated.config_of(manifest)
    _check_complete(folder, manifest)
    rows = {role: names.prompts(config, role) for role in ROLES}
    for role in ROLES:
        if (found := digest(rows[role])) != manifest["sha256"]["prompts"][role]:
            raise ValueError(
                f"prompts.{role}: the prompts at hand have hash {found}, those of the run "
                f"{manifest['sha256']['prompts'][role]}; put the run's own prompt file in its place."
            )
    texts = {role: _role(names.prompt_set(config, role), rows[role], clear) for role in ROLES}
    hashed = {text: sha for own in rows.values() for text, sha in ((p.prompt, sha256_of_text(p.prompt)) for p in own)}
    cells = tuple(_cell(cell, hashed) for cell in folder.complete_cells())
    # A submission is about the score, in which attacks and probes have no part. What they found stays with their owner.
    manifest["config"] = {key: value for key, value in manifest["config"].items() if key not in ("attacks", "probes")}
    manifest["sha256"].pop("probes", None)
    bundle = Bundle(manifest, texts, {}, _reference(folder), cells)
    bundle = bundle._replace(leaderboard=scores.recomputed(bundle))
    _check_scored(folder, bundle)
    return bundle


def _json(path: Path) -> Any:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; name the work directory of a finished run.")
    return json.loads(path.read_text(encoding="utf-8"))


def _check_complete(folder: Workdir, manifest: dict[str, Any]) -> None:
    """A submission holds all cells of its config and no others: none is left out because it scored badly."""
    cells = [_json(cell.summary) for cell in folder.complete_cells()]
    if faults := stated.cells_faults(stated.config_of(manifest), cells):
        raise ValueError(
            f"{folder.path}: {faults[0]}; finish the run, or give its cells a work directory of their own."
        )


def _role(prompt_set: str, rows: list[Prompt], clear: Collection[str]) -> dict[str, Any]:
    """The entry of a role in prompts.json. The order is that of the images."""
    in_clear = prompt_set in clear or is_own(prompt_set)
    listed = [
        {
            "id": prompt.id,
            "sha256": sha256_of_text(prompt.prompt),
            "category": prompt.category,
            "language": prompt.language,
            "seed": prompt.seed,
            "guidance": prompt.guidance,
        }
        for prompt in rows
    ]
    if in_clear:
        listed = [entry | {"text": prompt.prompt} for entry, prompt in zip(listed, rows, strict=True)]
    return {"set": prompt_set, "sha256": stated.digest_of_rows(listed), "clear": in_clear, "prompts": listed}


def is_own(prompt_set: str) -> bool:
    """Whether a prompt set is the emoji world's, which ships with this package under its licence."""
    return names.in_mini(prompt_set) is not None


def _cell(folder: CellFolder, hashed: dict[str, str]) -> BundledCell:
    table = records.read_table(folder.records, records.IMAGES.schema.names)
    texts = table.column("prompt").to_pylist()
    if unknown := [text for text in texts if text not in hashed]:
        raise ValueError(f"{folder.records}: {len(unknown)} records of prompts that the config does not name.")
    column = records.IMAGES.schema.get_field_index("prompt")
    table = table.set_column(column, "prompt", pa.array([hashed[text] for text in texts]))
    drift = (
        records.read_table(folder.drift, records.DRIFT.schema.names, records.DRIFT) if folder.drift.exists() else None
    )
    features = {name: np.ascontiguousarray(a, "<f4") for name, a in storage.read_npz(folder.features).items()}
    return BundledCell(folder.name, _json(folder.summary), table.combine_chunks(), features, drift)


def _reference(folder: Workdir) -> Arrays | None:
    path = folder.reference_features
    if not path.exists():
        return None
    with storage.local_copy(path) as file:
        mu, sigma = score.load_statistics(file)
    return {"mu": mu, "sigma": sigma, "identity": storage.read_npz(path)["identity"]}


def _check_scored(folder: Workdir, bundle: Bundle) -> None:
    """The run's own leaderboard, if there is one, must be the one that its records give."""
    if not folder.leaderboard().exists():
        return
    differ = scores.differences(_json(folder.leaderboard()), scores.without_evidence(bundle.leaderboard))
    if faults := [d for d in differ if not d.tolerated]:
        raise ValueError(
            f"{folder.leaderboard()} is not what the records give ({faults[0].line}); "
            f"run `python -m spqr_jax.score {folder.path}`."
        )
