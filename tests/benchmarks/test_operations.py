"""The operations of a compiled step are sorted by what they hold and by their part of it."""

import collections

import jax
import jax.numpy as jnp
import pytest

from benchmarks import models, operations


def test_operations_of_a_compiled_program_are_sorted():
    def step(weights, x):
        value, grads = jax.value_and_grad(lambda w: jnp.sum(jnp.tanh(jnp.concatenate([x, 2 * x], axis=-1) @ w)))(
            weights
        )
        return value, weights - 0.1 * grads / (1 + jnp.sqrt(grads * grads))

    text = jax.jit(step).lower(jnp.ones((128, 96)), jnp.ones((160, 64))).compile().as_text()
    found = set(operations.sorted_operations(text).values())
    assert {("products", "forward"), ("products", "backward")} <= found
    assert any(kind == "sums and means" for kind, part in found)
    assert ("element by element", "optimiser and the rest") in found


def test_rows_begin_with_the_largest_kind():
    total = collections.Counter(
        {("joins", "forward"): 1.0, ("products", "forward"): 2.0, ("products", "backward"): 5.0}
    )
    first, second = operations.table(total)
    assert (first["milliseconds a step"], first["backward"], first["share"]) == ("products", 5.0, 7 / 8)
    assert (second["milliseconds a step"], second["backward"], second["share"]) == ("joins", 0, 1 / 8)


@pytest.mark.slow
def test_most_of_a_real_step_is_found(tmp_path):
    directory, workload = models.directory("tiny", tmp_path), models.WORKLOADS["tiny"]
    rows = {row["milliseconds a step"]: row for row in operations.profiled(directory, workload, "standard", 2)}
    assert rows["products"]["backward"] > rows["products"]["forward"] > 0
    assert rows["element by element"]["optimiser and the rest"] > 0
