"""Attachments: additions to a pipeline that act only when it makes images, and that fine-tuning leaves alone.

A pipeline carries a tuple of them, at most one of each kind: safety guidance, added kernels, membranes. Each kind is a
file here and an entry of KINDS.
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
    """The attachment of this kind (a class) that the pipeline has; None if it has none."""
    return next((one for one in pipeline.attached if isinstance(one, kind)), None)


def attach(pipeline: Pipeline, attachment: Any) -> Pipeline:
    """The pipeline with one more attachment. It replaces an attachment of the same kind."""
    others = tuple(one for one in pipeline.attached if not isinstance(one, type(attachment)))
    return pipeline._replace(attached=(*others, attachment))


def check(attachments: Sequence[Attachment], evaluations: int) -> None:
    """Raise ValueError for an attachment that never acts in a sample of so many evaluations of the denoiser.

    Otherwise the model would be scored as if nothing were attached to it.
    """
    for one in attachments:
        one.check(evaluations)


def save(path: Path, attachments: Sequence[Attachment]) -> None:
    """Write attachments as a directory at `path`: their arrays, then attached.json. An older one is replaced."""
    path.mkdir(parents=True, exist_ok=True)
    note = path / "attached.json"
    note.unlink(missing_ok=True)
    kept = {one.kind: one.save(path) for one in attachments}
    storage.write_text(note, json.dumps(kept, indent=2) + "\n")


def load(path: Path) -> tuple[Any, ...]:
    """The attachments that `save` wrote, with NumPy arrays. Raises FileNotFoundError if there are none."""
    note = path / "attached.json"
    if not note.exists():
        raise FileNotFoundError(f"{note} does not exist; expected a directory written by `attached.save`.")
    saved = json.loads(note.read_text())
    return tuple(kind.load(path, saved[kind.kind]) for kind in KINDS if saved.get(kind.kind))
