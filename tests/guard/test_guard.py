"""The small run of this directory still gives what it gave: on any machine but for rounding.

What changes on purpose is recorded anew with `python -m tests.guard record`, which says what changed.
"""

import importlib.metadata
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.guard import collect, programs
from tests.guard.__main__ import EXPECTED, PICTURES
from tests.guard.compare import differences

# Other machines add up in another order. Pictures are rounded to whole levels, which moves a few by one; every figure
# of the leaderboard that is no share comes from judges that look at such pictures.
LEVELS = 3
RELATIVE, ABSOLUTE = 1e-2, 1e-3


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return json.loads(EXPECTED.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("guard")
    collect.run(folder / "work", Path(os.environ.get("JAX_COMPILATION_CACHE_DIR", folder / "cache")))
    return folder / "work"


@pytest.fixture(scope="module")
def found(workdir) -> dict[str, Any]:
    return collect.collect(workdir)


def test_the_same_programs_are_compiled(expected, found):
    """Jaxlib compiles what JAX hands it, so JAX's version alone decides what the programs look like."""
    if importlib.metadata.version("jax") != expected["versions"]["jax"]:
        pytest.skip(f"recorded with jax {expected['versions']['jax']}, which lowers to other operations")
    assert not differences({"programs": expected["programs"]}, {"programs": found["programs"]})


@pytest.mark.parametrize("section", ["ids", "verdicts", "drift"])
def test_ids_and_verdicts_are_the_same(expected, found, section):
    assert not differences({section: expected[section]}, {section: found[section]})


def test_pictures_are_the_same_within_a_few_levels(workdir):
    with np.load(PICTURES) as stored:
        pictures = collect.pictures(workdir)
        assert sorted(pictures) == sorted(stored.files)
        off = {name: np.abs(picture.astype(int) - stored[name]).max() for name, picture in pictures.items()}
    assert max(off.values()) <= LEVELS, off


def test_the_leaderboard_is_the_same_but_for_rounding(expected, found):
    assert not list(far_apart("leaderboard", expected["leaderboard"], found["leaderboard"]))


def far_apart(name: str, a: Any, b: Any) -> Iterator[str]:
    """Names of values that differ: numbers by more than rounding, all else at all."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        for key in a:
            yield from far_apart(f"{name}: {key}", a[key], b[key])
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, pair in enumerate(zip(a, b, strict=True)):
            yield from far_apart(f"{name}[{i}]", *pair)
    elif isinstance(a, float) and isinstance(b, int | float):
        if not np.isclose(b, a, rtol=RELATIVE, atol=ABSOLUTE):
            yield f"{name}: expected {a}, found {b}"
    elif a != b:
        yield f"{name}: expected {a}, found {b}"


# What the hashes of programs see


def described(function: Any, *arguments: Any) -> tuple[str, str]:
    program = programs.describe(jax.jit(function).lower(*arguments).as_text())
    return program["sorted"], program["wiring"]


def step(weights, x):
    def turn(_, carry):
        h, total = carry["h"], carry["total"]
        h = jnp.tanh(h @ weights["a"]) - h @ weights["b"]
        return {"h": h, "total": total + h.sum()}

    return jax.lax.fori_loop(0, 3, turn, {"h": x, "total": jnp.float32(0)})


def renamed(first, mapping):
    """`step` with other names, another order of arguments, carried values and results, and one more function."""

    @jax.jit
    def inner(x, left, right):
        return jnp.tanh(x @ left) - x @ right

    def turn(_, carry):
        total, x = carry
        x = inner(x, mapping["zz"], mapping["y"])
        return x.sum() + total, x

    return jax.lax.fori_loop(0, 3, turn, (jnp.float32(0), first))


def other_order(weights, x):
    """`step` with one difference taken the other way round."""

    def turn(_, carry):
        h, total = carry["h"], carry["total"]
        h = h @ weights["b"] - jnp.tanh(h @ weights["a"])
        return {"h": h, "total": total + h.sum()}

    return jax.lax.fori_loop(0, 3, turn, {"h": x, "total": jnp.float32(0)})


def test_names_and_orders_leave_a_programs_hashes_and_arithmetic_changes_them():
    x, a, b = jnp.ones((2, 4)), jnp.ones((4, 4)), jnp.ones((4, 4))
    operations, wiring = described(step, {"a": a, "b": b}, x)
    assert described(renamed, x, {"zz": a, "y": b}) == (operations, wiring)
    swapped = described(other_order, {"a": a, "b": b}, x)
    assert swapped[0] == operations
    assert swapped[1] != wiring
    assert described(lambda w, x: jax.tree.map(lambda v: v * 2, step(w, x)), {"a": a, "b": b}, x)[0] != operations


def test_differences_are_told_by_name():
    one = {"kind": "sampler", "operations": 400, "results": 2, "sorted": "s", "wiring": "w", "compiled": 1}
    before = {"programs": {"k": one}, "ids": {"cells": {"SPM": "spm-1"}}, "verdicts": {"SPM": "sU"}}
    assert not differences(before, before)
    after = {"programs": {"l": one | {"wiring": "v"}}, "ids": {"cells": {"SPM": "spm-2"}}, "verdicts": {"SPM": "sU"}}
    lines = differences(before, after)
    assert len(lines) == 3
    assert "ids: cells: SPM: expected spm-1, found spm-2" in lines
    assert any("is gone; l has the same operations in other places" in line for line in lines)
