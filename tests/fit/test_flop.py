"""The count of FLOP against XLA's own, and in loops and branches, which XLA counts once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spqr_jax.fit import flop


def counted(function, *shapes) -> float:
    inputs = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
    return flop.flop(jax.jit(function).trace(*inputs).jaxpr.jaxpr)


def by_xla(function, *shapes) -> float:
    inputs = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
    return jax.jit(function).lower(*inputs).cost_analysis()["flops"]


def convolved(stride: int):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lambda x, k: jax.lax.conv_general_dilated(x, k, (stride, stride), "VALID", dimension_numbers=numbers)


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (lambda a, b: a @ b, [(3, 5), (5, 7)]),
        (lambda a, b: jnp.einsum("blnd,bmnd->bnlm", a, b), [(2, 9, 3, 4), (2, 8, 3, 4)]),
        (convolved(1), [(2, 9, 9, 3), (3, 3, 3, 8)]),
        (convolved(2), [(2, 9, 9, 3), (3, 3, 3, 8)]),
    ],
)
def test_products_and_convolutions_as_xla_counts_them(function, shapes):
    assert counted(function, *shapes) == by_xla(function, *shapes) > 0


def test_every_turn_of_a_loop_and_the_dearest_branch():
    one = counted(lambda a, b: a @ b, (4, 4), (4, 4))

    def looped(a, b):
        return jax.lax.scan(lambda x, _: (x @ b, None), a, None, length=7)[0]

    def chosen(a, b):
        return jax.lax.cond(a[0, 0] > 0, lambda: a @ b @ b, lambda: a @ b)

    assert counted(looped, (4, 4), (4, 4)) == 7 * one
    assert counted(chosen, (4, 4), (4, 4)) == 2 * one
    assert counted(jax.checkpoint(looped), (4, 4), (4, 4)) == 7 * one
