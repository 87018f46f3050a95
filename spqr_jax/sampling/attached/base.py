"""The interface of attachments: `Attachment` outside the sampling loop, `Prepared` and `Act` inside it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import jax

from spqr_jax.backbones import Condition
from spqr_jax.params import Params
from spqr_jax.pipeline import Pipeline


class Act(Protocol):
    """The part of an attachment that runs inside the compiled sampling loop; hashable, static under `jax.jit`.

    predicts: whether it has a method `predict` that takes the place of classifier-free guidance, as that of
    `safe_guidance.SafeGuidance`.
    """

    predicts: ClassVar[bool]

    def insert(self, model: Any, weights: Params, rows: Any) -> None:
        """Change layers of a bound denoiser, before it predicts."""

    def start(self, latents: jax.Array) -> Any:
        """Its memory at the first step, which the loop carries from step to step. None if it has no memory."""


class Prepared(NamedTuple):
    """The contribution of an attachment to one call of the sampler.

    Attributes:
        act: its part inside the loop; None if its work is done before the loop.
        weights: its arrays that are placed on the devices like the denoiser's weights; None if it has none.
        numbers: its inputs that all images share.
        rows: its inputs for each image: a tree of arrays with one row for each image, or with one row for all.
    """

    act: Any = None
    weights: Params | None = None
    numbers: Any = None
    rows: Any = None


class Attachment(Protocol):
    """The interface of a kind of attachment."""

    kind: ClassVar[str]  # its name on disk
    in_loop: ClassVar[bool]  # whether it acts in the compiled loop, and so takes memory there
    needs_guidance: ClassVar[bool]  # whether it acts only under classifier-free guidance

    @property
    def texts(self) -> tuple[str, ...]:
        """Texts of its own, which are encoded together with the prompts."""

    def changed(self, weights: Params) -> Params:
        """The weights of the denoiser as they should be while images are made."""

    def prepare(self, pipeline: Pipeline, prompts: Sequence[str], said: Condition, own: Condition) -> Prepared:
        """Prepare for N prompts. said: their condition, N rows. own: the condition of this attachment's `texts`."""

    def check(self, evaluations: int) -> None:
        """Raise ValueError if the attachment never acts in a sample of so many evaluations of the denoiser."""

    def save(self, path: Path) -> Any:
        """Write its arrays under `path`. Returns everything else as a JSON value that is not false."""

    @classmethod
    def load(cls, path: Path, note: Any) -> Self:
        """The attachment that `save` wrote. note: the value that `save` returned."""
