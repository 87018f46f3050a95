"""Low-rank changes of UNet kernels, kept apart from the weights that they change."""

import functools
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from spqr_jax import params as params_lib
from spqr_jax.params import Definition, Params
from spqr_jax.sampling.attached import membranes
from spqr_jax.sampling.attached.delta import add


class LowRank(NamedTuple):
    """One kernel's change, down @ up: down [..., in, r] (leading axes as a 1x1 convolution's kernel), up [r, out]."""

    down: jax.Array | np.ndarray
    up: jax.Array | np.ndarray


Adapter = dict[str, LowRank]  # kernel path -> factors; a pytree


@dataclass(frozen=True)
class Added:
    """(unet, adapter) -> the UNet's weights with `scale` times the adapter added; may be traced."""

    scale: float = 1.0

    def __call__(self, unet: Params, adapter: Adapter) -> Params:
        return add(unet, delta(adapter, self.scale))


class Beside(NamedTuple):
    """A model's definition, with an adapter whose products are added to the outputs of layers.

    Its weights are the pair (the model's, adapter). It computes what `Added` would, and makes no copy of a kernel. That
    saves memory where many layers change.
    """

    definition: Definition
    scale: float

    def bind(self, weights: tuple[Params, Adapter]) -> Any:
        """The NNX module with these weights, as `Definition.bind`."""
        params, adapter = weights
        model = self.definition.bind(params)
        for path, factors in adapter.items():
            membranes.add_to_layer(model, path, functools.partial(_product, factors, self.scale))
        return model


def _product(factors: LowRank, scale: float, x: jax.Array) -> jax.Array:
    """scale * x @ down @ up, in the dtype of x [..., in]."""
    down, up = (factor.reshape(factor.shape[-2:]).astype(x.dtype) for factor in factors)
    return scale * ((x @ down) @ up)


def create(
    unet: Params, targets: re.Pattern, *, rank: int, seed: int, normal: bool = False, name: str = "adapter"
) -> Adapter:
    """Fresh float32 factors for every kernel whose path matches; `up` is zero, so nothing changes yet.

    down: U(-1/sqrt(in), 1/sqrt(in)), which is Kaiming's uniform with a = sqrt(5), or N(0, 1/r^2) where `normal`. Raises
    ValueError when no kernel matches or the rank does not fit one.
    """
    chosen = {path: leaf.shape for path, leaf in params_lib.flatten(unet).items() if targets.search(path)}
    if not chosen:
        raise ValueError(f"{name}: no layer of this UNet matches {targets.pattern}; it needs attention blocks.")
    rng, adapter = np.random.default_rng((seed, 0xADA)), {}
    for path, shape in chosen.items():
        if not 1 <= rank <= min(shape[-2:]):
            raise ValueError(f"{name}: rank {rank} does not fit {path} {shape}; expected 1..{min(shape[-2:])}.")
        if int(np.prod(shape[:-2])) != 1:
            raise ValueError(f"{name}: {path} {shape} is neither linear nor a 1x1 convolution.")
        size, bound = (*shape[:-1], rank), shape[-2] ** -0.5
        down = rng.normal(0, 1 / rank, size) if normal else rng.uniform(-bound, bound, size)
        adapter[path] = LowRank(down.astype(np.float32), np.zeros((rank, shape[-1]), np.float32))
    return adapter


def delta(adapter: Adapter, scale: float | jax.Array = 1.0) -> Params:
    """scale * down @ up for every kernel: a partial tree under the UNet's names."""
    return params_lib.unflatten({path: scale * (factors.down @ factors.up) for path, factors in adapter.items()})


def together(*deltas: Params | None) -> Params:
    """The sum of partial trees; a path may be in any of them."""
    flat: dict[str, jax.Array] = {}
    for tree in deltas:
        for path, change in params_lib.flatten(tree or {}).items():
            flat[path] = flat[path] + change if path in flat else change
    return params_lib.unflatten(flat)
