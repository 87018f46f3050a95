"""The formulations of attention for accelerators, on a CPU: outputs and gradients against PyTorch's attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from jax.experimental.pallas import tpu as pltpu

from spqr_jax.backbones.models import attention
from tests.parity.compared import relative_error

LIMITS = {jnp.float32: 5e-6, jnp.bfloat16: 2e-2}


def check(formulation, queries: int, keys: int, depth: int, dtype) -> None:
    rng = np.random.default_rng(0)
    shapes = [(1, queries, 2, depth), (1, keys, 2, depth), (1, keys, 2, depth), (1, queries, 2, depth)]
    *inputs, weight = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
    output, gradient = jax.vjp(formulation, *inputs)
    ours = output, *gradient(weight)
    theirs = [torch.tensor(np.asarray(x, np.float32)).transpose(1, 2).requires_grad_() for x in inputs]
    out = torch.nn.functional.scaled_dot_product_attention(*theirs)
    out.backward(torch.tensor(np.asarray(weight, np.float32)).transpose(1, 2))
    expected = [out.detach(), *(x.grad for x in theirs)]
    for mine, other in zip(ours, expected, strict=True):
        assert mine.dtype == dtype
        assert relative_error(np.asarray(mine, np.float32), other.transpose(1, 2).numpy()) < LIMITS[dtype]


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("queries", "keys"), [(64, 77), (63, 63), (64, 64)])
def test_lengths_padded_for_cudnn(queries, keys, dtype):
    check(lambda *x: attention.padded(*x, implementation="xla"), queries, keys, 40, dtype)


@pytest.mark.parametrize("dtype", LIMITS)
def test_all_scores_at_once(dtype):
    check(attention.plain, 64, 77, 40, dtype)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("queries", "keys", "scores"), [(300, 300, 2**26), (300, 77, 1), (64, 77, 2**26)])
def test_blocks_of_queries(queries, keys, scores, dtype, monkeypatch):
    """The last block is part of one, or a block is as small as it may be, or there is one."""
    monkeypatch.setattr(attention, "BLOCK_MAX_QUERIES", 256)
    monkeypatch.setattr(attention, "BLOCK_MAX_SCORES", scores)
    check(attention.blockwise, queries, keys, 40, dtype)


def test_gradients_of_keys_are_summed_over_many_blocks_without_rounding(monkeypatch):
    monkeypatch.setattr(attention, "BLOCK_MAX_QUERIES", 2)
    check(attention.blockwise, 256, 64, 40, jnp.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", LIMITS)
def test_the_kernel_for_tpus_interpreted(dtype):
    with pltpu.force_tpu_interpret_mode():
        check(lambda *x: attention.tiled(*x, None), 128, 256, 40, dtype)
