"""What every kind of attachment offers, and what it brings to the sampling loop."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import jax

from spqr_jax.backbones import Condition
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
