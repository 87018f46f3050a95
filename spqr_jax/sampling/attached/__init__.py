"""Attachments: what stays with a pipeline through fine-tuning and acts only when it generates images.

A pipeline carries a tuple of them, at most one of a kind: safety guidance, kernels that are added, membranes. Each
kind is a file here and a row of KINDS.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spqr_jax.files import storage
from spqr_jax.pipeline import Pipeline
from spqr_jax.sampling.attached.base import Attachment
from spqr_jax.sampling.attached.delta import Delta
from spqr_jax.sampling.attached.membranes import Membranes
from spqr_jax.sampling.attached.safe_guidance import SLD

# Every kind, in the order in which files name them.
KINDS = (SLD, Delta, Membranes)


def find(pipeline: Pipeline, kind: Any) -> Any:
    """The pipeline's attachment of a kind; None if it has none."""
    return next((one for one in pipeline.attached if isinstance(one, kind)), None)


def attach(pipeline: Pipeline, attachment: Any) -> Pipeline:
    """The pipeline with an attachment, which replaces one of the same kind."""
    others = tuple(one for one in pipeline.attached if not isinstance(one, type(attachment)))
    return pipeline._replace(attached=(*others, attachment))


def check(attachments: Sequence[Attachment], evaluations: int) -> None:
    """Raise ValueError for an attachment that never acts in a sample of so many evaluations of the denoiser.

    Such a model would be scored as safe or unsafe as if nothing were attached.
    """
    for one in attachments:
        one.check(evaluations)


def save(path: Path, attachments: Sequence[Attachment]) -> None:
    """Write attachments as a directory at `path`: their arrays, then attached.json. Replaces what is there."""
    path.mkdir(parents=True, exist_ok=True)
    note = path / "attached.json"
    note.unlink(missing_ok=True)
    kept = {one.kind: one.save(path) for one in attachments}
    storage.write_text(note, json.dumps(kept, indent=2) + "\n")


def load(path: Path) -> tuple[Any, ...]:
    """Read what `save` wrote, arrays as NumPy. Raises FileNotFoundError when nothing is there."""
    note = path / "attached.json"
    if not note.exists():
        raise FileNotFoundError(f"{note} does not exist; expected what `attached.save` writes.")
    saved = json.loads(note.read_text())
    return tuple(kind.load(path, saved[kind.kind]) for kind in KINDS if saved.get(kind.kind))
