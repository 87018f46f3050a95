"""A compiler in a process of its own: what it says, what is kept, and that it can be stopped."""

import functools
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from configs import mini as mini_config
from spqr_jax.fit import planned, targets, worker
from spqr_jax.fit.programs import Program
from spqr_jax.fit.worker import Job, Wait
from spqr_jax.run import protocol

ROOT = Path(__file__).parents[2]
WEIGHTS = 2 * 256 * 256


@pytest.fixture
def no_cache():
    """A program from JAX's own cache is not compiled, so its compiler writes no plan."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


def _step(x, y):
    return jnp.sin(x @ y) @ y, (x[0] * 2).sum()


def small(plan):
    """A program that gives one of its arguments away."""
    shape = jax.ShapeDtypeStruct((256, 256), np.float32)
    return Program("small", {"batch": 1}, lambda: jax.jit(_step, donate_argnums=0).trace(shape, shape))


def long(plan):
    """A program whose machine code takes longer than its plan: many loops of different shapes."""

    def chain(x):
        return sum(jnp.sin(x[i:] * i).sum() for i in range(1, 60))

    return Program("long", {"batch": 1}, lambda: jax.jit(chain).trace(jax.ShapeDtypeStruct((256, 256), np.float32)))


def endless(plan):
    """A program whose tracing does not end."""
    return Program("endless", {"batch": 1}, lambda: jax.jit(lambda: time.sleep(3600)).trace())


def left_alone(plan, file):
    """A program that says which process traces it, and whose tracing does not end."""
    Path(file).write_text(str(os.getpid()))
    return endless(plan)


def dying(plan):
    return Program("dying", {"batch": 1}, lambda: jax.jit(functools.partial(exit, 3)).trace())


def job(make, *arguments):
    return Job(protocol.resolve(mini_config.get_config()), targets.find("cpu"), 1, make, arguments)


def test_a_program_is_measured_and_kept(tmp_path):
    wait = Wait(cache=tmp_path)
    first, second = (worker.measure(job(small), wait) for _ in range(2))
    assert first.compiles and not first.cached and second == first._replace(cached=True)
    assert first.parts["arguments"] == 2 * WEIGHTS * 2 and first.until == "code" and first.flops == 4 * 256**3
    assert len(list(tmp_path.iterdir())) == 1


def test_the_plan_that_a_compiler_writes_down_is_what_it_says_in_the_end(tmp_path, no_cache):
    """The same program, asked of its compiler, and read from the folder. An argument is given away."""
    compiled = small(None).trace().lower().compile({planned.DUMP: str(tmp_path)})
    memory, parts = compiled.memory_analysis(), planned.read(tmp_path).parts
    said = {name: getattr(memory, f"{field}_size_in_bytes") for name, field in FIELDS.items()}
    assert parts["aliased"] == WEIGHTS * 2
    assert parts == pytest.approx(said, abs=64)  # a constant or two
    for pattern in (planned.PLAN, planned.REPORT, planned.PROGRAM):  # one that is being written is no plan yet
        (file,) = tmp_path.glob(pattern)
        text = file.read_text()
        for part in ("", text[:12], text[: len(text) // 2], text[: text.rfind("\nallocation") + 1] or text[:-3]):
            file.write_text(part)
            whole = pattern == planned.REPORT and part.startswith(text[:99])  # the sum stands in its second line
            assert (planned.read(tmp_path) is not None) == whole
        file.write_text(text)
    assert planned.read(tmp_path) == planned.Planned(parts, next(tmp_path.glob(planned.PROGRAM)).read_text())


FIELDS = {"arguments": "argument", "outputs": "output", "temporaries": "temp", "aliased": "alias"}


def test_a_plan_that_takes_more_than_there_is_is_the_answer(tmp_path):
    too_large = Wait(cache=tmp_path, limit=WEIGHTS)
    first, second = (worker.measure(job(long), too_large) for _ in range(2))
    assert first.compiles and first.until == "plan" and first.bytes > WEIGHTS and second == first._replace(cached=True)
    enough = worker.measure(job(long), too_large._replace(limit=2 * first.bytes))
    assert enough.until == "code" and not enough.cached and enough.bytes == pytest.approx(first.bytes, rel=1e-3)


def test_a_compiler_that_takes_too_long_is_stopped():
    start = time.monotonic()
    stopped = worker.measure(job(endless), Wait(seconds=1))
    assert not stopped.compiles and stopped.bytes is None and time.monotonic() - start < 60
    assert stopped.reason.startswith("stopped after ") and stopped.reason.endswith("not known")


def test_a_compiler_that_ends_is_told_of():
    assert "ended with status 3" in worker.measure(job(dying), Wait()).reason


ASK = """
import sys
from spqr_jax.fit.worker import Wait, measure
from tests.fit.test_worker import job, left_alone
measure(job(left_alone, sys.argv[1]), Wait())
"""


def test_a_compiler_does_not_outlive_the_one_who_asked(tmp_path):
    file = tmp_path / "pid"
    with subprocess.Popen([sys.executable, "-c", ASK, str(file)], cwd=ROOT) as asking:
        wait_for(lambda: file.exists() and file.read_text())
        asking.kill()
    wait_for(lambda: not Path(f"/proc/{file.read_text()}").exists())


def wait_for(what, seconds=120):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)
