"""Devices: padding, rounding, and how arrays lie on eight virtual devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import mini
from spqr_jax.devices import mesh as mesh_lib
from spqr_jax.run import cells
from spqr_jax.run.identity import Inputs


def test_one_axis_over_all_devices():
    mesh = mesh_lib.make()
    assert mesh.axis_names == ("data",) and mesh.size == jax.device_count()


def test_pad_batch_repeats_the_last_row():
    rows = np.arange(6).reshape(3, 2)
    np.testing.assert_array_equal(mesh_lib.pad_batch(rows, 5), [[0, 1], [2, 3], [4, 5], [4, 5], [4, 5]])
    assert mesh_lib.pad_batch(rows, 3) is rows


SCRIPT = """
import jax, numpy as np
from spqr_jax.devices import mesh as mesh_lib
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


def on_eight_devices(script: str, *arguments: str) -> str:
    """What a script prints that sees eight devices."""
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    env["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-c", script, *arguments]
    run = subprocess.run(command, cwd=Path(__file__).parents[2], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


def test_eight_devices():
    on_eight_devices(SCRIPT)


SAVING = """
import sys
from pathlib import Path

import jax
import numpy as np

from spqr_jax.files import checkpoint
from spqr_jax.devices import mesh as mesh_lib

tree = {"a": {str(i): np.full((64 + i, 64), i, np.float32) for i in range(4)}}
state = mesh_lib.replicate(tree, mesh_lib.make())
compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None
)
checkpoint.save(Path(sys.argv[1]) / "whole", tree)
with checkpoint.Steps(Path(sys.argv[1]) / "steps", every=1) as saved:
    saved.save(1, state)
assert not compiled, compiled
jax.jit(lambda x: x + 1)(1.0)
assert compiled  # the listener hears
np.testing.assert_equal(checkpoint.load(Path(sys.argv[1]) / "whole"), tree)
"""


def test_saving_compiles_nothing(tmp_path):
    """A program for every shape and device, as Orbax makes by default, takes minutes for a UNet on eight devices."""
    on_eight_devices(SAVING, str(tmp_path))


@pytest.mark.parametrize("batch", [1, 5])
def test_one_device_needs_no_rounding(batch):
    if jax.device_count() == 1:
        assert mesh_lib.round_up(batch, mesh_lib.make()) == batch


def test_layout_splits_the_largest_axis_that_the_devices_divide():
    def spec(*shape: int) -> tuple:
        return tuple(mesh_lib.spec(shape, 8))

    assert spec(3, 3, 320, 640) == (None, None, None, "data")
    assert spec(10240, 1280) == ("data",)
    assert spec(4096, 4096) == ("data",)
    assert spec(1001, 1280) == (None, "data")  # the largest axis is not divisible
    assert spec(3, 3, 77, 99) == spec(8, 8) == spec() == ()  # indivisible, small, a number
    assert tuple(mesh_lib.spec((3, 3, 320, 640), 1)) == ()


def test_how_devices_are_used_is_in_no_cells_id():
    split = mini.get_config()
    split.mesh.fsdp = True
    inputs = Inputs("sha", {}, {name: name for name in split.bft.scenarios}, {"": ""})
    ids = [[cell.id for cell in cells.plan(c, Path("w"), inputs)[1]] for c in (mini.get_config(), split)]
    assert ids[0] == ids[1]


# Fine-tuning and sampling with everything split over eight devices, beside the same with everything whole on each.
SPLIT = """
import json, pathlib, sys
import jax, numpy as np
from spqr_jax import finetune, generate, params as params_lib
from spqr_jax.devices import mesh as mesh_lib
from spqr_jax.finetune import Memory, Optimiser
from tests import tiny

profile, accumulate, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
mesh, pipeline, data = mesh_lib.make(), tiny.pipeline(), tiny.dataset()
assert mesh.size == 8
seen = {}
make_step = finetune.train_step

def watched(*arguments):
    step = make_step(*arguments)

    def one(state, frozen, *rest):
        seen.setdefault("first", jax.tree.map(lambda x: x.sharding, state))
        new, report = step(state, frozen, *rest)
        seen.update(old=state, new=new, frozen=frozen)
        return new, report

    return one

finetune.train_step = watched
OPTIONS = {
    "steps": 4, "batch_size": 8 * accumulate, "optimiser": Optimiser(warmup_steps=0), "seed": 3,
    "memory": Memory(accumulate=accumulate),
}

def train(**options):
    seen.clear()
    return params_lib.flatten(finetune.train(pipeline, data, profile, **OPTIONS, **options).leaves)

def on_first_device(tree):
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))

def share(tree):
    return on_first_device(tree) / max(params_lib.nbytes(tree), 1)  # standard freezes nothing

def apart(a, b):
    norm = lambda x: float(np.linalg.norm(x.astype(np.float64)))
    return max(norm(a[path] - b[path]) / norm(b[path]) for path in b)

whole = train()
result = {"whole": share(seen["new"])}
split = train(fsdp=True)
kept = {k: v for k, v in seen["new"].items() if k != "step"}
result |= {
    "state": share(kept),
    "frozen": share(seen["frozen"]),
    "donated": all(x.is_deleted() for x in jax.tree.leaves(seen["old"])),
    "layout kept": jax.tree.all(jax.tree.map(
        lambda a, x: a.is_equivalent_to(x.sharding, x.ndim), seen["first"], seen["new"])),
    "apart": apart(split, whole),
    "moved": max(
        float(np.abs(split[p] - x).max()) for p, x in params_lib.flatten(pipeline.params["unet"]).items() if p in split)
    if profile != "lite" else 1.0,
}

class Killed(Exception):
    pass

def kill(progress):
    if progress.step == 3:
        raise Killed

try:
    train(fsdp=True, checkpoints=pathlib.Path(folder), checkpoint_every=2, on_step=kill)
except Killed:
    pass
steps = []
resumed = train(fsdp=True, checkpoints=pathlib.Path(folder), checkpoint_every=2,
                on_step=lambda p: steps.append(p.step))
result |= {
    "steps after resuming": steps,
    "resumed": all(np.array_equal(resumed[p], split[p]) for p in split),
    "restored": jax.tree.all(jax.tree.map(
        lambda a, x: a.is_equivalent_to(x.sharding, x.ndim), seen["first"], seen["new"])),
}

prompts, seeds = ["a cat", "the dog", "nude"], [1, 2, 3]
images = [generate.generate(pipeline, prompts, seeds, steps=3, scheduler="ddim", fsdp=fsdp) for fsdp in (False, True)]
result["levels"] = int(np.abs(images[0].astype(int) - images[1]).max())
result["contrast"] = float(images[0].std())
print(json.dumps(result))
"""


@pytest.fixture(
    scope="module",
    params=[
        ("moderate", 1),
        pytest.param(("lite", 2), marks=pytest.mark.slow),
        pytest.param(("standard", 2), marks=pytest.mark.slow),
    ],
    ids=lambda p: f"{p[0]}-{p[1]}",
)
def split(request, tmp_path_factory):
    """(profile, what the script found)."""
    profile, accumulate = request.param
    folder = tmp_path_factory.mktemp("split") / "training"
    return profile, json.loads(on_eight_devices(SPLIT, profile, str(accumulate), str(folder)).splitlines()[-1])


def test_split_weights_are_trained_as_whole_ones(split):
    _, found = split
    assert found["apart"] <= 1e-6 and found["moved"] > 1e-5


def test_each_device_holds_an_eighth(split):
    profile, found = split
    assert found["whole"] == 1.0
    if profile != "lite":  # adapters are small and stay whole
        assert found["state"] < 1.1 / 8
    if profile != "standard":  # nothing is frozen
        assert found["frozen"] < 1.1 / 8
    assert found["donated"] and found["layout kept"]


def test_a_split_run_continues_from_its_checkpoint_to_the_same_bits(split):
    _, found = split
    assert found["steps after resuming"] == [3, 4] and found["resumed"] and found["restored"]


def test_split_weights_give_the_pictures_of_whole_ones(split):
    _, found = split
    assert found["levels"] <= 1 and found["contrast"] > 20


# A fine-tuning whose last batches are short: 8 samples on eight devices, then 2.
SHORT = """
import json
import jax, numpy as np
from spqr_jax import finetune, params as params_lib
from spqr_jax.finetune import Optimiser
from tests import tiny

pipeline, data = tiny.pipeline(real=False), tiny.dataset(10)
options = {"stages": "increments", "order": "file", "epochs": 2, "batch_size": 8}
options["optimiser"] = Optimiser(warmup_steps=0)

def run(devices):
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    losses = []
    tuned = finetune.train(pipeline, data, "standard", mesh=mesh, on_step=lambda p: losses.append(p.loss), **options)
    return losses, params_lib.flatten(tuned.leaves)

(one, a), (eight, b) = run(1), run(8)
start = params_lib.flatten(pipeline.params["unet"])
print(json.dumps({
    "losses": [one, eight],
    "apart": max(float(np.abs(a[path] - b[path]).max()) for path in a),
    "moved": max(float(np.abs(a[path] - start[path]).max()) for path in a),
}))
"""


def test_short_batches_on_eight_devices_give_what_one_device_gives():
    result = json.loads(on_eight_devices(SHORT).splitlines()[-1])
    one, eight = result["losses"]
    assert len(one) == 4
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    assert result["apart"] <= 1e-2 * result["moved"]
