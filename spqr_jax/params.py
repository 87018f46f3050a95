"""Parameter pytrees: nested dicts of arrays. The path of a leaf, joined by dots, is its name in diffusers.

`{"down_blocks": {"0": {"attentions": ...}}}` <-> "down_blocks.0.attentions...". All keys are strings, positions in
lists too, so that Orbax and JSON do not change a tree.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

Params = dict[str, Any]


class Definition(NamedTuple):
    """A model without its weights: hashable, static under `jax.jit`."""

    graphdef: Any

    def bind(self, params: Params) -> Any:
        """The NNX module with these weights. Cheap: call it inside a jitted function."""
        return nnx.merge(self.graphdef, _int_keys(params))


def _int_keys(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {int(k) if k.isdigit() else k: _int_keys(v) for k, v in tree.items()}


def _str_keys(tree: Any) -> Any:
    return {str(k): _str_keys(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def split(model: nnx.Module) -> tuple[Definition, Params]:
    """The definition and the weights of a module."""
    graphdef, state = nnx.split(model)
    return Definition(graphdef), _str_keys(nnx.to_pure_dict(state))


class OneKey(nnx.Rngs):
    """Random keys for a model of which only the shapes are wanted: every layer draws with the same one.

    nnx.Rngs counts its calls, and in a traced function each call takes longer than the one before it.
    """

    def __init__(self) -> None:
        pass

    def params(self) -> jax.Array:
        return jax.random.key(0)


def skeleton(make: Callable[[], nnx.Module]) -> tuple[Definition, Params]:
    """As `split(make())`, with shapes (jax.ShapeDtypeStruct) in the place of arrays. Nothing is allocated."""
    return split(nnx.eval_shape(make))


def flatten(params: Params) -> dict[str, Any]:
    """Nested dict -> {"a.b.0.kernel": leaf}, in the order of the tree."""
    flat: dict[str, Any] = {}

    def walk(tree: Params, prefix: str) -> None:
        for key, value in tree.items():
            path = f"{prefix}.{key}" if prefix else key
            if isinstance(value, dict):
                walk(value, path)
            else:
                flat[path] = value

    walk(params, "")
    return flat


def unflatten(flat: dict[str, Any]) -> Params:
    """The inverse of `flatten`."""
    tree: Params = {}
    for path, value in flat.items():
        *parents, leaf = path.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[leaf] = value
    return tree


def map_with_path(fn: Callable[[str, Any], Any], params: Params) -> Params:
    """The tree with `fn(path, leaf)` in the place of every leaf."""
    return unflatten({path: fn(path, leaf) for path, leaf in flatten(params).items()})


def partition(params: Params, mask: Params) -> tuple[Params, Params]:
    """(the leaves where `mask` is True, the other leaves), each as a nested dict without the leaves of the other."""
    flat, flags = flatten(params), flatten(mask)
    chosen = {path: leaf for path, leaf in flat.items() if flags[path]}
    rest = {path: leaf for path, leaf in flat.items() if not flags[path]}
    return unflatten(chosen), unflatten(rest)


def merge(*trees: Params) -> Params:
    """The union of trees. A leaf that is in several trees comes from the last of them."""
    flat: dict[str, Any] = {}
    for tree in trees:
        flat |= flatten(tree)
    return unflatten(flat)


def count(params: Params) -> int:
    """Number of scalars in a tree of arrays or shapes."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


def nbytes(params: Params) -> int:
    """Number of bytes of a tree of arrays or shapes."""
    return sum(int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(params))


def cast(params: Params, dtype: Any) -> Params:
    """The tree with every floating-point leaf in `dtype`. A leaf that has this dtype already is not copied."""
    wanted = jax.numpy.dtype(dtype)

    def leaf(x: Any) -> Any:
        return x.astype(wanted) if jax.numpy.issubdtype(x.dtype, jax.numpy.floating) and x.dtype != wanted else x

    return jax.tree.map(leaf, params)
