"""Membranes: low-rank changes of a denoiser. Each acts on an image with a strength that follows from the prompt.

This is the facilitated transport of SPM (Lyu et al., CVPR 2024, section 3.3), for a batch of images with a prompt each.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spqr_jax import params as params_lib
from spqr_jax.backbones import Condition
from spqr_jax.files import checkpoint
from spqr_jax.params import Params
from spqr_jax.pipeline import Pipeline, token_sets
from spqr_jax.sampling.attached.base import Prepared
from spqr_jax.training import lora

# kernel path -> {"down": [M, in, r], "up": [M, r, out]} of M membranes. `up` includes the scale of the adapters.
Factors = dict[str, dict[str, Any]]
SCALINGS = ("paper", "code")


@dataclass(frozen=True)
class Membranes:
    """M membranes that are kept apart from the weights.

    Attributes:
        targets: the text that each membrane erases.
        scaling: "paper": a kernel changes by sum_i gamma_i down_i up_i. "code", as in the authors' inference code: it
            changes by (sum_i gamma_i down_i)(sum_i gamma_i up_i).
        factors: the low-rank factors of all membranes.
    """

    targets: tuple[str, ...]
    scaling: str
    factors: Factors

    kind: ClassVar[str] = "membranes"
    in_loop: ClassVar[bool] = True
    needs_guidance: ClassVar[bool] = False

    @property
    def texts(self) -> tuple[str, ...]:
        return self.targets

    def changed(self, weights: Params) -> Params:
        return weights

    def prepare(self, pipeline: Pipeline, prompts: Sequence[str], said: Condition, own: Condition) -> Prepared:
        words = (token_sets(pipeline, part) for part in (prompts, self.targets))
        gammas = permeability(np.asarray(said.context), np.asarray(own.context), *words)
        return Prepared(Transport(self.scaling), self.factors, rows=gammas)

    def check(self, evaluations: int) -> None:
        del evaluations

    def save(self, path: Path) -> dict[str, Any]:
        flat = {f"{name}.{side}": factor for name, pair in self.factors.items() for side, factor in pair.items()}
        checkpoint.save(path / self.kind, params_lib.unflatten(flat))
        return {"targets": self.targets, "scaling": self.scaling}

    @classmethod
    def load(cls, path: Path, note: dict[str, Any]) -> Self:
        factors: Factors = {}
        for name, factor in params_lib.flatten(checkpoint.load(path / cls.kind)).items():
            kernel, _, side = name.rpartition(".")
            factors.setdefault(kernel, {})[side] = factor
        return cls(tuple(note["targets"]), note["scaling"], factors)


@dataclass(frozen=True)
class Transport:
    """The membranes inside the loop: they change the outputs of layers, and have no memory."""

    scaling: str

    predicts: ClassVar[bool] = False

    def insert(self, model: Any, weights: Factors, rows: jax.Array) -> None:
        insert(model, weights, rows, self.scaling)

    def start(self, latents: jax.Array) -> None:
        del latents


def permeability(
    states: np.ndarray, targets: np.ndarray, said: Sequence[set[int]], wanted: Sequence[set[int]]
) -> np.ndarray:
    """gamma float32 [N, M]: the strength of membrane m for prompt n, the larger of two similarities.

    The first is the cosine of the flattened text states, `states` [N, L, E] and `targets` [M, L, E]. The second is the
    share of the tokens of the target text (`wanted`) that occur in the prompt (`said`).
    """
    a, b = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (states, targets))
    norms = np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1)
    cosine = a @ b.T / np.maximum(norms, 1e-30)
    share = np.array([[len(p & t) / len(t) for t in wanted] for p in said])
    return np.maximum(cosine, share).astype(np.float32)


class Permeable(nnx.Module):
    """A layer with a change that is added to its output."""

    def __init__(self, layer: Any, change: Any):
        self.layer, self.change = layer, change

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.layer(x) + self.change(x)


def insert(unet: Any, factors: Factors, gammas: jax.Array, scaling: str) -> None:
    """Add membranes to the layers of a bound denoiser, with the strengths gammas [B, M] for B images.

    A batch of the denoiser may hold each of the B images several times in a row, under other texts.
    """
    for path, pair in factors.items():
        add_to_layer(unet, path, functools.partial(_change, pair["down"], pair["up"], gammas, scaling))


def add_to_layer(model: Any, path: str, change: Callable[[jax.Array], jax.Array]) -> None:
    """Add change(x) to the output for x of the layer of a bound model that has the kernel `path`."""
    outer, _, name = path.removesuffix(".kernel").rpartition(".")
    parent = lora.module_at(model, outer)
    if name.isdigit():
        parent[int(name)] = Permeable(parent[int(name)], change)
    else:
        setattr(parent, name, Permeable(getattr(parent, name), change))


def _change(down: jax.Array, up: jax.Array, gammas: jax.Array, scaling: str, x: jax.Array) -> jax.Array:
    """The change of a layer's output for its input x [B k, ..., in]."""
    down, up = down.astype(x.dtype), up.astype(x.dtype)
    gammas = jnp.repeat(gammas.astype(x.dtype), len(x) // len(gammas), axis=0)
    if scaling == "paper":
        inner = jnp.einsum("b...i,mir,bm->b...mr", x, down, gammas)
        return jnp.einsum("b...mr,mro->b...o", inner, up)
    inner = jnp.einsum("b...i,bir->b...r", x, jnp.einsum("bm,mir->bir", gammas, down))
    return jnp.einsum("b...r,bro->b...o", inner, jnp.einsum("bm,mro->bro", gammas, up))
