"""Devices: padding, rounding, and how arrays lie on eight virtual devices."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from spqr_jax import mesh as mesh_lib


def test_one_axis_over_all_devices():
    mesh = mesh_lib.make()
    assert mesh.axis_names == ("data",) and mesh.size == jax.device_count()


def test_pad_batch_repeats_the_last_row():
    rows = np.arange(6).reshape(3, 2)
    np.testing.assert_array_equal(mesh_lib.pad_batch(rows, 5), [[0, 1], [2, 3], [4, 5], [4, 5], [4, 5]])
    assert mesh_lib.pad_batch(rows, 3) is rows


SCRIPT = """
import jax, numpy as np
from spqr_jax import mesh as mesh_lib
mesh = mesh_lib.make()
assert mesh.size == 8
assert [mesh_lib.round_up(n, mesh) for n in (1, 8, 9, 16)] == [8, 8, 16, 16]
x = np.arange(32.0).reshape(16, 2)
split = mesh_lib.split_batch({"x": x}, mesh)["x"]
assert [shard.data.shape for shard in split.addressable_shards] == [(2, 2)] * 8
assert len({shard.device for shard in split.addressable_shards}) == 8
np.testing.assert_array_equal(np.asarray(split), x)
whole = mesh_lib.replicate({"x": x}, mesh)["x"]
assert [shard.data.shape for shard in whole.addressable_shards] == [(16, 2)] * 8
np.testing.assert_allclose(jax.jit(lambda a, b: (a * b).sum())(split, whole), (x * x).sum())
try:
    mesh_lib.split_batch(x[:5], mesh)
except ValueError:
    pass
else:
    raise AssertionError("5 rows were split over 8 devices")
"""


def test_eight_devices():
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    root = Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", SCRIPT], cwd=root, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.parametrize("batch", [1, 5])
def test_one_device_needs_no_rounding(batch):
    if jax.device_count() == 1:
        assert mesh_lib.round_up(batch, mesh_lib.make()) == batch
