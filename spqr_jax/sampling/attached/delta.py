"""Kernels that are added to those of the denoiser while it makes images, and not while it is trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from spqr_jax import params as params_lib
from spqr_jax.backbones import Condition
from spqr_jax.files import checkpoint
from spqr_jax.params import Params
from spqr_jax.pipeline import Pipeline
from spqr_jax.sampling.attached.base import Prepared


@dataclass(frozen=True)
class Delta:
    """Added kernels. `kernels`: a tree with some of the denoiser's names, and arrays of the same shapes."""

    kernels: Params

    kind: ClassVar[str] = "delta"
    in_loop: ClassVar[bool] = False
    needs_guidance: ClassVar[bool] = False

    @property
    def texts(self) -> tuple[str, ...]:
        return ()

    def changed(self, weights: Params) -> Params:
        return add(weights, self.kernels)

    def prepare(self, pipeline: Pipeline, prompts: Sequence[str], said: Condition, own: Condition) -> Prepared:
        return Prepared()

    def check(self, evaluations: int) -> None:
        del evaluations

    def save(self, path: Path) -> bool:
        checkpoint.save(path / "delta", self.kernels)
        return True

    @classmethod
    def load(cls, path: Path, note: bool) -> Self:
        return cls(checkpoint.load(path / "delta"))


def add(weights: Params, delta: Params | None) -> Params:
    """The denoiser's weights plus `delta`, in the dtypes of the weights. Both may be traced.

    Raises ValueError that names a leaf of `delta` if the denoiser lacks it, or has it in another shape.
    """
    if delta is None:
        return weights
    flat, changes = params_lib.flatten(weights), params_lib.flatten(delta)
    for path, change in changes.items():
        if path not in flat or flat[path].shape != change.shape:
            found = "no such weight" if path not in flat else f"shape {flat[path].shape}"
            raise ValueError(f"delta {path} {change.shape} does not fit the UNet ({found}); was it made for another?")
    return params_lib.unflatten(
        {p: (leaf + changes[p]).astype(leaf.dtype) if p in changes else leaf for p, leaf in flat.items()}
    )
