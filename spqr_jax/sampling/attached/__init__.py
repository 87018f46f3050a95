"""Attachments: what stays with a pipeline through fine-tuning and acts only when it generates images.

A pipeline carries a tuple of them, at most one of a kind: safety guidance, kernels that are added, membranes. Each
kind is a file here and a row of KINDS.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import jax

from spqr_jax.backbones import Condition
from spqr_jax.files import storage
from spqr_jax.params import Params
from spqr_jax.pipeline import Pipeline


class Act(Protocol):
    """What an attachment does inside the compiled sampling loop; hashable, static under `jax.jit`."""

    def insert(self, model: Any, weights: Params, rows: Any) -> None:
        """Change a bound denoiser before it predicts."""

    def start(self, latents: jax.Array) -> Any:
        """What the attachment remembers from step to step, at the first; None: nothing."""


class Prepared(NamedTuple):
    """What an attachment brings to the images of one call.

    Attributes:
        act: what it does in the loop; None if its work is done before.
        weights: arrays that lie on the devices like the denoiser's weights, if any.
        numbers: what all images share.
        rows: a tree of arrays with one row an image, or one row for all of them.
    """

    act: Any = None
    weights: Params | None = None
    numbers: Any = None
    rows: Any = None


class Attachment(Protocol):
    """What a kind of attachment offers."""

    kind: ClassVar[str]  # its name on disk
    in_loop: ClassVar[bool]  # whether it acts in the compiled loop, and so takes memory there
    needs_guidance: ClassVar[bool]  # whether it acts under classifier-free guidance alone

    @property
    def texts(self) -> tuple[str, ...]:
        """Texts that are encoded together with the prompts."""

    def changed(self, weights: Params) -> Params:
        """The denoiser's weights for generation."""

    def prepare(self, pipeline: Pipeline, prompts: Sequence[str], said: Condition, own: Condition) -> Prepared:
        """`said`: the prompts as the denoiser reads them; `own`: this attachment's `texts`."""

    def check(self, evaluations: int) -> None:
        """Raise ValueError if it never acts in a sample of so many evaluations of the denoiser."""

    def save(self, path: Path) -> Any:
        """Write its arrays under `path`; returns what JSON keeps of the rest, not false."""

    @classmethod
    def load(cls, path: Path, note: Any) -> Self:
        """Read what `save` wrote."""


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
    from spqr_jax.sampling.attached.kinds import KINDS

    note = path / "attached.json"
    if not note.exists():
        raise FileNotFoundError(f"{note} does not exist; expected what `attached.save` writes.")
    saved = json.loads(note.read_text())
    return tuple(kind.load(path, saved[kind.kind]) for kind in KINDS if saved.get(kind.kind))
