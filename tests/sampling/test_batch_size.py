"""The batch size that is chosen: against made-up limits and memory, against what compiled programs say, and kept."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

import convert
from spqr_jax import config, mini
from spqr_jax import generate as generate_lib
from spqr_jax.devices import memory
from spqr_jax.files import images
from spqr_jax.files.layout import CellFolder
from spqr_jax.prompts import Prompt
from spqr_jax.run import protocol
from spqr_jax.run.stages import generate as stage
from spqr_jax.sampling import batch_size
from tests import tiny
from tests.compilations import compilations

PROMPTS = [f"prompt {i}" for i in range(11)]
OPTIONS = {"steps": 2, "scheduler": "ddim"}


class Programs:
    """Programs of made-up memory: weights, a constant, and so much a picture; `tried` is what was compiled."""

    def __init__(self, weights: int, constant: int, each: int, refuses: int = 10**9):
        self.weights, self.constant, self.each, self.refuses = weights, constant, each, refuses
        self.tried: list[int] = []

    def __call__(self, size: int) -> Any:
        self.tried.append(size)
        if size > self.refuses:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: ran out of memory in memory space hbm")
        stats = SimpleNamespace(
            argument_size_in_bytes=self.weights,
            temp_size_in_bytes=self.constant + (self.each - 1) * size,
            output_size_in_bytes=size,
            alias_size_in_bytes=0,
        )
        return SimpleNamespace(memory_analysis=lambda: stats)

    def largest(self, limit: int | None, most: int = 64) -> int:
        return batch_size.largest(self, most, weights=self.weights, limit=limit, what="a model at 512x512")


@pytest.mark.parametrize("count", [1, 63, 64, 65, 100, 200, 300, 10_000])
@pytest.mark.parametrize("most", [1, 7, 64])
def test_even_batches_are_as_many_and_pad_least(count, most):
    size = batch_size.even(count, most)
    batches = -(-count // most)
    assert size <= most and -(-count // size) == batches
    assert size == 1 or batches * (size - 1) < count  # one image less in a batch would need another batch


@pytest.mark.parametrize(
    ("limit", "size", "tried"),
    [
        (1640, 64, [64]),  # 1000 + 64 x 10: fits to the byte, and nothing else is compiled
        (1639, 32, [64, 32]),
        (1320, 32, [64, 32]),
        (1319, 16, [64, 16]),  # 32 is known not to fit
        (1010, 1, [64, 1]),
    ],
)
def test_the_largest_half_that_fits(limit, size, tried):
    programs = Programs(1000, 0, 10)
    assert (programs.largest(limit), programs.tried) == (size, tried)


def test_a_constant_beside_the_weights_only_costs_a_compilation():
    """From 1740 bytes for 64 follow 1185 or more for 16, which then take 1260."""
    programs = Programs(1000, 100, 10)
    assert programs.largest(1250) == 8 and programs.tried == [64, 16, 8]


def test_sizes_need_not_be_powers_of_two():
    programs = Programs(1000, 0, 10)
    assert programs.largest(1100, most=25) == 6 and programs.tried == [25, 6]


def test_one_that_does_not_fit_is_an_error_with_bytes_and_remedies():
    programs = Programs(10**10, 0, 10**9)
    with pytest.raises(
        MemoryError, match=r"a model at 512x512: one image on each device takes 11 GB \(weights 10 GB\)"
    ) as e:
        programs.largest(9 * 10**9, most=8)
    assert "has 9 GB" in str(e.value) and "mesh.fsdp" in str(e.value) and "bfloat16" in str(e.value)
    assert programs.tried == [8, 1]


def test_a_compiler_that_refuses_says_it_does_not_fit():
    programs = Programs(1000, 0, 10, refuses=16)
    assert programs.largest(10**6) == 16 and programs.tried == [64, 32, 16]
    with pytest.raises(MemoryError, match="takes more than there is"):
        Programs(1000, 0, 10, refuses=0).largest(10**6)


def test_other_faults_of_the_compiler_are_not_hidden():
    def broken(size):
        raise jax.errors.JaxRuntimeError("INTERNAL: no such instruction")

    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        batch_size.largest(broken, 4, weights=0, limit=10)


def test_without_a_limit_nothing_is_compiled():
    programs = Programs(1000, 0, 10)
    assert programs.largest(None) == 64 and programs.tried == []


def test_bytes_are_the_compiled_programs_own():
    x = np.zeros(1000, np.float32)
    assert memory.program_bytes(jax.jit(lambda x: 2 * x).lower(x).compile()) == 8000
    donated = jax.jit(lambda x: 2 * x, donate_argnums=0).lower(x).compile()
    assert memory.program_bytes(donated) == 4000  # the result lies where the argument was
    product = jax.jit(lambda x: (x[:, None] @ x[None]) @ x).lower(x).compile()
    assert memory.program_bytes(product) > 4_000_000  # what lies between counts


def mesh(stats=None, platform="gpu", count=1):
    """As much of a mesh as says what devices there are."""
    device = SimpleNamespace(memory_stats=lambda: stats, platform=platform)
    return SimpleNamespace(local_devices=[device] * count)


def test_limits_of_devices():
    stats = {"bytes_limit": 80 * 2**30, "bytes_in_use": 50 * 2**30}
    assert memory.memory_limit(mesh(stats)) == 72 * 2**30
    assert memory.memory_limit(mesh(stats), beside=True) == 22 * 2**30
    assert memory.memory_limit(mesh({"bytes_limit": 2**30, "bytes_in_use": 2**30}), beside=True) == 0
    assert memory.memory_limit(mesh(None)) is None
    alone, eight = (memory.memory_limit(mesh(None, "cpu", n)) for n in (1, 8))
    physical = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert alone == pytest.approx(physical / 2, rel=0.01) and eight == pytest.approx(alone / 8, rel=0.01)


def test_more_than_pays_is_not_asked_for():
    """16 pictures of 512x512 and 4 of 1024x1024 a device, 64 of the emoji world's; a CPU in parts remains one."""
    sides = (64, 96, 128, 512, 32, 8)
    assert [batch_size.worthwhile(side * side, mesh(count=8)) for side in sides] == [16, 7, 4, 1, 64, 64]
    assert [batch_size.worthwhile(8 * 8, mesh(None, "cpu", count)) for count in (1, 2, 8)] == [64, 32, 8]


@pytest.fixture(scope="module")
def pipeline():
    return tiny.pipeline(real=False)


@pytest.fixture
def limit(monkeypatch):
    def set_to(value):
        monkeypatch.setattr(memory, "memory_limit", lambda mesh, beside=False: value)

    return set_to


@pytest.fixture
def compiled(monkeypatch):
    """Sizes of the batches that are compiled for, and the bytes each takes."""
    seen: dict[int, int] = {}
    measure = memory.needed_bytes

    def watched(program, size):
        seen[size] = measure(program, size)
        return seen[size]

    monkeypatch.setattr(memory, "needed_bytes", watched)
    return seen


def test_a_real_programs_batch_shrinks_with_the_limit(pipeline, limit, compiled):
    sizes = {}
    for value in (10**9, None):
        limit(value)
        sizes[value] = generate_lib.largest_batch(pipeline, 16, **OPTIONS)
    assert sizes == {10**9: 16, None: 16} and list(compiled) == [16]
    limit(compiled[16] - 1)
    assert generate_lib.largest_batch(pipeline, 16, **OPTIONS) == 8
    assert compiled[8] < compiled[16] and compiled[8] > compiled[16] / 4
    limit(10)
    with pytest.raises(MemoryError, match="tiny at 16x16: one image on each device takes"):
        generate_lib.largest_batch(pipeline, 16, **OPTIONS)


def test_small_sizes_change_no_picture(pipeline, limit, compiled):
    limit(10**9)
    whole = generate_lib.generate(pipeline, PROMPTS, list(range(11)), **OPTIONS)
    assert list(compiled) == [11]
    limit(compiled[11] - 1)
    parts = [part for _, part in generate_lib.batches(pipeline, PROMPTS, list(range(11)), **OPTIONS)]
    assert [len(part) for part in parts] == [5, 5, 1]
    assert np.abs(np.concatenate(parts).astype(int) - whole).max() <= 1 and whole.std() > 20


def test_the_program_that_fits_is_compiled_once(pipeline, limit):
    """Choosing and then sampling compiles what sampling alone would."""
    with compilations() as names:
        limit(10**9)
        size = generate_lib.largest_batch(pipeline, 13, **OPTIONS)
        chosen = len(names)
        generate_lib.generate(pipeline, ["a"] * 13, list(range(13)), batch_size=size, **OPTIONS)
    assert chosen == 1 and sum("sample" in name for name in names) == 1, names


def test_a_chosen_size_is_kept(tmp_path):
    file, calls = tmp_path / "w" / "batch_sizes.json", []

    def choose(size):
        return lambda: calls.append(size) or size

    assert batch_size.remembered(file, "a", choose(16)) == 16
    assert batch_size.remembered(file, "b", choose(8)) == 8
    assert batch_size.remembered(file, "a", choose(4)) == 16 and calls == [16, 8]
    assert json.loads(file.read_text()) == {"a": 16, "b": 8}


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 0}', '{"a": "16"}', '{"a": true}'])
def test_a_damaged_file_is_set_aside(tmp_path, content):
    file = tmp_path / "batch_sizes.json"
    file.write_text(content)
    assert batch_size.remembered(file, "a", lambda: 4) == 4
    assert (tmp_path / "batch_sizes.json.damaged-1").read_text() == content
    assert json.loads(file.read_text()) == {"a": 4}


@pytest.fixture
def run(tmp_path):
    """As much of a run as making its pictures needs: 11 harmful prompts and none benign."""
    prompts = {"harmful": [Prompt(f"p{i}", text, seed=i) for i, text in enumerate(PROMPTS)], "benign": []}
    c = protocol.resolve(config.Config(generation=config.Generation(steps=2, scheduler="ddim")))
    return SimpleNamespace(config=c, workdir=tmp_path, prompts=prompts)


def make(run, pipeline) -> dict[str, bytes]:
    stage.draw_phase(run, lambda: pipeline, CellFolder(run.workdir / "cell"), "before", "tiny")
    return {path.name: path.read_bytes() for path in (run.workdir / "cell").rglob("*.png")}


def test_a_continued_run_computes_the_same_batches(run, pipeline, limit, compiled, monkeypatch):
    """A picture of the last, smaller batch is lost, and memory has changed since: still five, five and one."""
    limit(10**9)
    generate_lib.largest_batch(pipeline, 11, **OPTIONS)
    limit(compiled[11] - 1)
    assert len(made := make(run, pipeline)) == 11
    assert list(json.loads((run.workdir / "batch_sizes.json").read_text()).values()) == [5]
    (run.workdir / "cell" / "images" / "before_harmful" / images.file_name("p10", 0)).unlink()
    limit(10**9)
    sampled: list[int] = []
    sample = generate_lib.sample

    def watched(*arguments):
        sampled.append(len(arguments[3]))  # the noise
        return sample(*arguments)

    monkeypatch.setattr(generate_lib, "sample", watched)
    assert make(run, pipeline) == made and sampled == [5]


def test_a_pinned_size_wins(run, pipeline, limit, compiled):
    limit(1)  # nothing would fit
    run.config.generation.batch_size = 4
    assert len(make(run, pipeline)) == 11
    assert not compiled and not (run.workdir / "batch_sizes.json").exists()
    run.config.generation.batch_size = 64
    jobs: list = stage.phase_jobs(run)
    assert stage.batch_size(run, pipeline, jobs) == 11


def test_sizes_are_kept_apart_by_what_takes_memory(run, pipeline, limit):
    limit(10**9)
    jobs: list = stage.phase_jobs(run)
    stage.batch_size(run, pipeline, jobs)
    stage.batch_size(run, pipeline, jobs, training=True)
    run.config.mesh.fsdp = True
    stage.batch_size(run, pipeline, jobs)
    run.config.generation.guidance = 1.0
    stage.batch_size(run, pipeline, jobs)
    keys = json.loads((run.workdir / "batch_sizes.json").read_text())
    assert len(keys) == 4 and all(key.startswith("11 pictures of 16x16, 1 x cpu, ") for key in keys)


def test_the_emoji_worlds_batches_are_even(run, limit):
    """At most 64 images, and no more batches than with 64."""
    backbone = convert.load(mini.model_path())
    limit(None)
    for count, expected in ((5, 5), (64, 64), (100, 50), (300, 60)):
        run.prompts["harmful"] = [Prompt(str(i), "a cat") for i in range(count)]
        assert stage.batch_size(run, backbone, stage.phase_jobs(run)) == expected
