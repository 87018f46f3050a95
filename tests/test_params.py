"""Parameter trees: names, partition, counting, and modules taken apart and put together."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from spqr_jax import params as params_lib
from spqr_jax.backbones.models.layers import Linear

TREE = {"a": {"0": {"kernel": np.ones((2, 3), np.float32)}, "10": {"bias": np.zeros(3, np.float32)}}, "b": np.arange(4)}


class Model(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.layers = nnx.List([Linear(3, 4, rngs=rngs), Linear(4, 2, use_bias=False, rngs=rngs)])

    def __call__(self, x):
        return self.layers[1](self.layers[0](x))


def test_flatten_and_back():
    flat = params_lib.flatten(TREE)
    assert list(flat) == ["a.0.kernel", "a.10.bias", "b"]
    assert jax.tree.structure(params_lib.unflatten(flat)) == jax.tree.structure(TREE)


def test_split_and_bind_compute_the_same():
    model = Model(rngs=nnx.Rngs(0))
    definition, params = params_lib.split(model)
    assert set(params_lib.flatten(params)) == {"layers.0.kernel", "layers.0.bias", "layers.1.kernel"}
    x = np.ones((1, 3), np.float32)
    bound = jax.jit(lambda p: definition.bind(p)(x))(params)
    kernels = [np.asarray(params["layers"][i]["kernel"], np.float64) for i in "01"]
    expected = (x @ kernels[0] + np.asarray(params["layers"]["0"]["bias"])) @ kernels[1]
    np.testing.assert_allclose(bound, expected, rtol=1e-6)


def test_definitions_of_equal_models_are_one_jit_key():
    """Two loads of one architecture must not compile twice."""
    (one, _), (two, _) = (params_lib.split(Model(rngs=nnx.Rngs(seed))) for seed in (0, 1))
    assert one == two and hash(one) == hash(two)


def test_skeleton_allocates_nothing():
    definition, shapes = params_lib.skeleton(lambda: Model(rngs=params_lib.OneKey()))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(shapes))
    assert (definition, shapes) == params_lib.skeleton(lambda: Model(rngs=nnx.Rngs(0)))
    real_definition, real = params_lib.split(Model(rngs=nnx.Rngs(0)))
    assert definition == real_definition
    assert jax.tree.map(lambda x: x.shape, shapes) == jax.tree.map(lambda x: x.shape, real)


def test_partition_and_merge_are_inverse():
    mask = params_lib.map_with_path(lambda path, _: path.endswith("kernel"), TREE)
    chosen, rest = params_lib.partition(TREE, mask)
    assert list(params_lib.flatten(chosen)) == ["a.0.kernel"]
    assert list(params_lib.flatten(rest)) == ["a.10.bias", "b"]
    merged = params_lib.flatten(params_lib.merge(chosen, rest))
    assert merged.keys() == params_lib.flatten(TREE).keys()
    assert all(merged[path] is leaf for path, leaf in params_lib.flatten(TREE).items())


def test_later_trees_win():
    assert params_lib.merge({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}) == {"a": {"b": 3, "c": 2}}


def test_count_and_bytes():
    assert params_lib.count(TREE) == 6 + 3 + 4
    assert params_lib.nbytes(TREE) == 4 * 9 + TREE["b"].nbytes
    shapes = {"x": jax.ShapeDtypeStruct((3, 5), jnp.bfloat16)}
    assert (params_lib.count(shapes), params_lib.nbytes(shapes)) == (15, 30)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_cast_changes_floats_only(dtype):
    cast = params_lib.flatten(params_lib.cast(TREE, dtype))
    assert cast["a.0.kernel"].dtype == jnp.dtype(dtype) and cast["b"].dtype == TREE["b"].dtype
