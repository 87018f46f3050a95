"""torch_randn against torch.randn."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest

from spqr_jax.sampling.torch_noise import torch_randn

SEEDS = [0, 1, 42, 2**31 + 7, 4290749014, 2**32 - 1, 2**32 + 5, 2**63 + 11, -3]
SHAPES = [(1,), (2,), (3,), (3, 5), (16,), (17,), (31,), (32,), (5, 7), (4, 4, 4), (2, 3, 5, 7), (1, 4, 64, 64)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", SEEDS)
def test_gives_the_numbers_of_torch(seed, shape):
    torch = pytest.importorskip("torch")
    expected = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)).numpy()
    found = torch_randn(seed, shape)
    assert found.dtype == np.float32 and found.shape == shape
    # PyTorch's scalar kernel (no AVX2) rounds the angle in another way.
    tolerance = 3e-6 if torch.backends.cpu.get_cpu_capability() == "DEFAULT" else 1e-6
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


def test_a_million_values_stay_within_tolerance():
    torch = pytest.importorskip("torch")
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("this machine's PyTorch runs its scalar kernel")
    expected = torch.randn(10**6 + 3, generator=torch.Generator("cpu").manual_seed(9)).numpy()
    assert np.abs(torch_randn(9, 10**6 + 3) - expected).max() <= 1e-6


def test_every_size_below_two_blocks():
    torch = pytest.importorskip("torch")
    for size in range(34):
        expected = torch.randn(size, generator=torch.Generator("cpu").manual_seed(123)).numpy()
        np.testing.assert_allclose(torch_randn(123, size), expected, rtol=0, atol=3e-6)


def test_known_values_without_torch():
    # torch 2.13: torch.randn(4, 4, generator=torch.Generator("cpu").manual_seed(0)), first row
    np.testing.assert_allclose(torch_randn(0, (4, 4))[0], [-1.1258398, -1.1523602, -0.2505786, -0.4338788], atol=1e-6)


def test_stable_diffusion_latents_take_under_five_milliseconds():
    def seconds():
        start = time.perf_counter()
        torch_randn(7, (1, 4, 64, 64))
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 5e-3


@pytest.mark.parametrize(
    ("seed", "shape", "message"), [(2**64, (4,), "seed"), (-(2**63) - 1, 4, "seed"), (0, (2, -1), "shape")]
)
def test_refuses(seed, shape, message):
    with pytest.raises(ValueError, match=message):
        torch_randn(seed, shape)


def test_leaves_the_global_generator_alone_and_imports_no_torch():
    code = """
import sys, numpy as np
from spqr_jax.sampling.torch_noise import torch_randn
np.random.seed(1); before = np.random.get_state()[1].copy(); torch_randn(3, 20)
assert (np.random.get_state()[1] == before).all() and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
