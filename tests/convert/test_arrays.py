"""Copies of arrays, and how JAX takes them over."""

import ml_dtypes
import numpy as np
import pytest

import convert
from convert import arrays, tensors
from spqr_jax import mini
from spqr_jax.devices import mesh as mesh_lib
from spqr_jax.params import flatten


@pytest.mark.parametrize("shape", [(), (0,), (5,), (70, 33), (70, 33, 1, 1), (40, 6, 3, 3)])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_a_copy_is_numpys(shape, dtype):
    source = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    for view in (source, source.T, source[::-1] if shape else source):
        copy = arrays.contiguous(view, np.float32)
        np.testing.assert_array_equal(copy, view.astype(np.float32))
        assert copy.flags.c_contiguous and not copy.flags.writeable
        assert not source.size or copy.ctypes.data % arrays.ALIGNMENT == 0
        assert not np.shares_memory(copy, source)


def test_jax_uses_loaded_weights_without_a_copy():
    """A second copy would double what a model takes on a CPU."""
    loaded = flatten(convert.load(mini.model_path()).params["unet"])
    placed = mesh_lib.replicate(loaded, mesh_lib.make())
    for path, leaf in loaded.items():
        shard = placed[path].addressable_shards[0].data
        assert shard.unsafe_buffer_pointer() == leaf.ctypes.data, path


def test_a_tensor_is_a_view_that_outlives_a_release():
    file = tensors.TensorFile(mini.model_path() / "unet" / "diffusion_pytorch_model.safetensors")
    key = next(iter(file))
    tensor = file[key]
    before = tensor.copy()
    file.release()
    np.testing.assert_array_equal(tensor, before)
    with pytest.raises(ValueError, match="read-only"):
        tensor[...] = 0
