"""What a training holds on the devices: whole on one of them, or split over several."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from spqr_jax import params as params_lib
from spqr_jax.devices import mesh as mesh_lib
from spqr_jax.params import Params


class Held(NamedTuple):
    """What stays on the devices from step to step, as arrays or as shapes.

    Attributes:
        params: the trained leaves.
        state: the optimiser's.
        mask: over the elements of the trained leaves, or None.
        frozen: trees that no step changes.
    """

    params: Params
    state: Any
    mask: Params | None
    frozen: tuple[Any, ...]

    def fixed_bytes(self, split: Mesh | None) -> int:
        """Bytes of all this on each device, and of the gradients."""
        trees = shapes((*self, self.params))
        return params_lib.nbytes(trees) if split is None else mesh_lib.bytes_each(_places(trees, split))

    def arguments(self, given: tuple[Any, ...], split: Mesh | None) -> tuple[Any, ...]:
        """What a step is compiled from, with `given`, its own inputs. If it is to be split: shapes and their places."""
        held = self if split is None else _places(shapes(self), split)
        given = given if split is None else mesh_lib.row_shapes(shapes(given), split)
        return held.params, held.state, held.mask, *held.frozen, *given


def hold(
    start: Callable[[Params], Any], params: Params, mask: Params | None, frozen: tuple[Any, ...], split: Mesh | None
) -> Held:
    """The beginning of a training, whose optimiser's state is start(params).

    The trained leaves are copied, since a step takes their memory. Under `split` they, the state, the mask and the
    frozen leaves are split over that mesh as `mesh_lib.layout` says, and otherwise whole on one device.
    """
    if split is None:
        params = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), params)
        mask, frozen = jax.tree.map(jnp.asarray, (mask, frozen))
        return Held(params, start(params), mask, frozen)
    params, mask, frozen = mesh_lib.place((params, mask, frozen), split, fsdp=True)
    begin = lambda params: (jax.tree.map(jnp.copy, params), start(params))  # noqa: E731
    places = mesh_lib.layout(jax.eval_shape(begin, params), split, fsdp=True)
    params, state = jax.jit(begin, out_shardings=places)(params)
    return Held(params, state, mask, frozen)


def shapes(tree: Any) -> Any:
    """The shape and the dtype that every leaf has in a compiled program."""
    kinds = jax.tree.map(jax.typeof, tree)
    return jax.tree.map(lambda kind: jax.ShapeDtypeStruct(kind.shape, kind.dtype), kinds)


def _places(tree: Any, split: Mesh) -> Any:
    return mesh_lib.shapes(tree, split, fsdp=True)
