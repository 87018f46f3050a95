"""The way to compute a training step that is chosen: against made-up programs, what compiled ones say, and kept."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from spqr_jax import backbones, config, finetune
from spqr_jax import params as params_lib
from spqr_jax.devices import mesh as mesh_lib
from spqr_jax.devices.memory import needed_bytes
from spqr_jax.files import choices
from spqr_jax.files.layout import CellFolder
from spqr_jax.finetune import Memory, Optimiser
from spqr_jax.run import bft, protocol
from spqr_jax.run.stages import finetune as stage
from spqr_jax.training import latents, memory
from spqr_jax.training.memory import Way, open_ways
from spqr_jax.training.step import OPEN
from tests import tiny
from tests.compilations import compilations

OPTIONS = {"steps": 3, "batch_size": 8, "optimiser": Optimiser(lr=1e-3, warmup_steps=0), "seed": 3}


def test_ways_are_tried_in_the_order_of_their_time():
    parts = [Way(), Way(1, True), Way(2, True), Way(4, True)]
    split = [way._replace(fsdp=True) for way in parts]
    assert open_ways(OPEN, None, 4, 1) == open_ways(OPEN, False, 4, 1) == parts
    assert open_ways(OPEN, None, 16, 4) == parts + split
    assert open_ways(OPEN, True, 16, 4) == split
    assert open_ways(OPEN, None, 2, 2) == [Way(), Way(1, True), Way(fsdp=True), Way(1, True, True)]
    assert [way.accumulate for way in open_ways(OPEN, None, 6, 1)] == [1, 1, 2, 3, 6]


def test_what_is_given_is_obeyed():
    assert open_ways(Memory(4, False), False, 16, 4) == [Way(4)]
    assert open_ways(Memory(4, None), None, 16, 1) == [Way(4), Way(4, True)]
    assert open_ways(Memory(0, False), None, 4, 1) == [Way(), Way(2), Way(4)]
    assert open_ways(Memory(0, True), None, 2, 1) == [Way(1, True), Way(2, True)]


class Programs:
    """Programs of made-up memory: weights and state, and activations. Four devices share the first if it is split."""

    def __init__(self, state: int, activations: int, refuses: tuple[Way, ...] = ()):
        self.state, self.activations, self.refuses = state, activations, refuses
        self.tried: list[Way] = []

    def fixed(self, fsdp: bool) -> int:
        return self.state // 4 if fsdp else self.state

    def __call__(self, way: Way) -> int | None:
        self.tried.append(way)
        kept = self.activations // (4 if way.remat else 1) // way.accumulate
        return None if way in self.refuses else self.fixed(way.fsdp) + kept

    def choose(self, limit: int | None, ways: list[Way] | None = None) -> Way:
        ways = open_ways(OPEN, None, 16, 4) if ways is None else ways
        return memory.choose(ways, self, fixed=self.fixed, limit=limit, what="tiny, profile standard")


@pytest.mark.parametrize(
    ("limit", "way", "tried"),
    [
        (2000, Way(), 1),  # fits to the byte, and nothing else is compiled
        (1999, Way(1, True), 2),
        (1249, Way(2, True), 3),
        (1124, Way(4, True), 3),  # 2 parts are known not to fit
        (1061, Way(1, True, True), 4),  # neither do 4, and of the split ones the whole batch takes 1,250
        (800, Way(1, True, True), 2),  # state alone does not fit on one device
        (499, Way(2, True, True), 3),
    ],
)
def test_the_first_that_fits(limit, way, tried):
    programs = Programs(1000, 1000)
    assert programs.choose(limit) == way and len(programs.tried) == tried


def test_a_compiler_that_refuses_says_it_does_not_fit():
    programs = Programs(1000, 0, refuses=(Way(), Way(1, True)))
    assert programs.choose(10**6) == Way(2, True) == programs.tried[-1]


def test_without_a_limit_or_a_choice_nothing_is_compiled():
    programs = Programs(1000, 1000)
    assert programs.choose(None) == Way()
    assert programs.choose(1, [Way(4, True)]) == Way(4, True) and programs.tried == []


def test_nothing_fits_is_an_error_with_bytes_and_remedies():
    programs = Programs(10 * 10**9, 40 * 10**9)
    with pytest.raises(MemoryError, match=r"tiny, profile standard: the smallest program takes 20 GB \(remat\)") as e:
        programs.choose(12 * 10**9, [Way(), Way(1, True)])
    assert "gradients are 10 GB; a device has 12 GB" in str(e.value)
    assert all(part in str(e.value) for part in ("leave bft.accumulate to be", "mesh.fsdp", "dtype", "bft.resolution"))
    with pytest.raises(MemoryError, match=r"takes more than there is on each device") as e:
        Programs(10 * 10**9, 0).choose(2 * 10**9)
    assert "gradients are 2.5 GB; a device has 2 GB" in str(e.value) and "mesh.fsdp" not in str(e.value)


def test_another_way_than_the_first_is_told(caplog):
    caplog.set_level(logging.WARNING)
    Programs(1000, 1000).choose(2000)
    assert not caplog.records
    Programs(1000, 1000).choose(1200)
    assert "tiny, profile standard: computed in another way, so that it fits: remat, 2 parts" in caplog.text


# --- real programs


def relative_distance(a, b, start) -> float:
    """The distance between two results, as a share of the way that the second has gone from `start`."""
    a, b, start = (params_lib.flatten(leaves) for leaves in (a, b, start))
    moved = np.sqrt(sum(np.square(b[path] - start[path]).sum() for path in b))
    assert moved > 0
    return np.sqrt(sum(np.square(a[path] - b[path]).sum() for path in b)) / moved


def steps_in(names: list[str]) -> int:
    return sum("step" in name for name in names)


def bytes_of(pipeline, profile: str, way: Way, size=(16, 16)) -> tuple[int, int]:
    """(bytes of the step's program, bytes that no way makes smaller)."""
    options = finetune.Options(batch_size=8, optimiser=OPTIONS["optimiser"])
    step = finetune.step_of(pipeline, profile, size, options, mesh_lib.make())
    return needed_bytes(lambda: step.trace(way).lower().compile()) or 0, step.fixed_bytes(way.fsdp)


def test_a_real_step_is_computed_in_parts_when_the_limit_is_small():
    """Each program is compiled once, by the choice or by the training, and the weights are the same."""
    pipeline, data = tiny.pipeline(), tiny.dataset()
    in_parts = OPTIONS | {"memory": Memory(0, False)}
    with compilations() as names:
        whole = finetune.train(pipeline, data, "moderate", **OPTIONS)
        size, fixed = bytes_of(pipeline, "moderate", Way())
        assert fixed < size and steps_in(names) == 1
        parts = finetune.train(pipeline, data, "moderate", **in_parts, limit=size - 1)
        way = finetune.way_to_fit(pipeline, data, "moderate", **_without("seed", in_parts), limit=size - 1)
        assert way.accumulate > 1 and not way.remat and steps_in(names) == 2
    assert bytes_of(pipeline, "moderate", way)[0] < size
    assert relative_distance(parts.leaves, whole.leaves, pipeline.params["unet"]) <= 1e-3


def _without(name: str, options: dict) -> dict:
    return {key: value for key, value in options.items() if key != name}


def test_nothing_is_trained_or_encoded_if_nothing_fits():
    pipeline, data = tiny.pipeline(real=False), tiny.dataset()
    with (
        compilations() as names,
        pytest.raises(MemoryError, match=r"^tiny, profile standard, 8 images of 16x16: .* 6.55e-05 GB; a device has"),
    ):
        finetune.train(pipeline, data, "standard", **OPTIONS, limit=1000)
    assert not any("encode" in name or "step" in name for name in names)  # state alone does not fit


def test_the_encoders_batch_halves_until_it_fits():
    pipeline, data = tiny.pipeline(real=False), tiny.dataset(8)
    with compilations() as names:
        whole = latents.encode(pipeline, data)
    assert sum("encode" in name for name in names) <= 1  # what was asked about is what runs
    encoder = (backbones.of(pipeline), pipeline.definitions["vae"], pipeline.params["vae"])

    def size(count: int) -> int:
        images = jax.ShapeDtypeStruct((count, 16, 16, 3), np.uint8)
        return needed_bytes(lambda: latents.encode_batch.lower(*encoder, images).compile()) or 0

    assert size(2) < size(4) < size(8)
    with compilations() as names:
        parts = latents.encode(pipeline, data, limit=size(2))
    assert not names  # the three programs are here already
    np.testing.assert_allclose(parts.mean, whole.mean, rtol=1e-6, atol=1e-6)
    with pytest.raises(MemoryError, match=r"vae: encoding images of 16x16, 1 at once, takes .*\(bft.resolution\)"):
        latents.encode(pipeline, data, limit=10)


ON_FOUR = """
import json
import jax, numpy as np
from spqr_jax import finetune, params as params_lib
from spqr_jax.training.memory import Way
from tests import tiny
from tests.compilations import compilations
from tests.training.test_memory import OPTIONS, bytes_of, steps_in

pipeline, data = tiny.pipeline(real=False), tiny.dataset()
sizes = [bytes_of(pipeline, "standard", way)[0] for way in (Way(), Way(fsdp=True))]
with compilations() as names:
    results = [params_lib.flatten(finetune.train(pipeline, data, "standard", **OPTIONS, limit=limit).leaves)
               for limit in (max(sizes), sizes[1])]
options = {key: value for key, value in OPTIONS.items() if key != "seed"}
ways = [finetune.way_to_fit(pipeline, data, "standard", **options, limit=limit) for limit in (max(sizes), sizes[1])]
try:
    finetune.way_to_fit(pipeline, data, "standard", **options, limit=sizes[1], fsdp=False)
except MemoryError as error:
    refused = str(error)
start = pipeline.params["unet"]["conv_in"]["kernel"]
a, b = (result["conv_in.kernel"] for result in results)
print(json.dumps({
    "devices": jax.device_count(), "sizes": sizes, "ways": ways, "refused": refused, "compiled": steps_in(names),
    "apart": float(np.linalg.norm(a - b) / np.linalg.norm(b)), "moved": float(np.abs(b - start).max()),
}))
"""


def test_on_several_devices_the_state_is_split_if_nothing_else_fits():
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    env["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    command = [sys.executable, "-c", ON_FOUR]
    run = subprocess.run(command, cwd=Path(__file__).parents[2], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["devices"] == 4 and found["sizes"][1] < found["sizes"][0]
    assert found["ways"] == [list(Way()), list(Way(fsdp=True))]
    assert found["apart"] <= 1e-6 and found["moved"] > 1e-5
    assert "split weights and state over several devices (mesh.fsdp)" in found["refused"]


# --- a run


@pytest.fixture
def run(tmp_path):
    """As much of a run as choosing needs."""
    return SimpleNamespace(config=protocol.resolve(config.Config()), workdir=tmp_path)


def chosen(run, profile="standard", **options):
    cell = SimpleNamespace(profile=profile, folder=CellFolder(run.workdir / "cells" / "a"))
    pipeline, data = tiny.pipeline(real=False), tiny.dataset()
    options = bft.training_options(run.config, profile, 3) | options
    return stage.fitting(run, pipeline, data, cell, options)


def test_a_continued_run_computes_in_the_same_way(run):
    assert chosen(run) == {"memory": Memory(), "fsdp": False}
    file = run.workdir / "training_memory.json"
    ((key, way),) = json.loads(file.read_text()).items()
    assert key.startswith("standard, 16 images of 16x16, ") and way == Way()._asdict()
    assert json.loads((run.workdir / "cells" / "a" / "log" / "memory.json").read_text()) == way
    file.write_text(json.dumps({key: Way(2, True, True)._asdict()}))
    assert chosen(run, limit=1) == {"memory": Memory(2, True), "fsdp": True}


def test_what_the_config_gives_is_obeyed_and_kept_apart(run):
    chosen(run)
    run.config.bft.accumulate, run.config.bft.remat, run.config.mesh.fsdp = 4, True, False
    assert chosen(run, limit=1) == {"memory": Memory(4, True), "fsdp": False}
    keys = json.loads((run.workdir / "training_memory.json").read_text())
    assert len(keys) == 2 and max(keys, key=len).endswith("accumulate 4, remat True, fsdp False")


FORM = {"accumulate": 1, "remat": False}


@pytest.mark.parametrize(
    "content", ["{", '{"a": 2}', '{"a": {"accumulate": 0, "remat": true}}', '{"a": {"remat": true}}']
)
def test_damaged_choices_are_set_aside(tmp_path, content):
    file = tmp_path / "choices.json"
    file.write_text(content)
    assert choices.remembered(file, "a", lambda: {"accumulate": 2, "remat": True}, FORM) == {
        "accumulate": 2,
        "remat": True,
    }
    assert (tmp_path / "choices.json.damaged-1").read_text() == content
    kept = choices.remembered(file, "a", lambda: pytest.fail("chosen again"), FORM)
    assert kept == {"accumulate": 2, "remat": True} and type(kept["remat"]) is bool
