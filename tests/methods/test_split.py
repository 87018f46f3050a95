"""Methods on several devices: a training that fits no single device is split, and gives what one device gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from spqr_jax.devices import mesh as mesh_lib
from spqr_jax.methods import METHODS
from spqr_jax.methods.contract import smallest, tiny
from spqr_jax.methods.contract.checks import CONCEPT
from spqr_jax.methods.tools import loop
from tests import stand_in
from tests.compilations import compilations

# All weights trained, with samples of the student; a sum of gradients, then a mask, and a batch to share; adapters
# beside frozen weights. SPM's loss on anchors is 1000 times a difference that is all rounding at first.
TRAINED = {
    "esd": {"steps": 3},
    "salun": {"steps": 2, "mask_steps": 1, "images": 4, "batch_size": 4},
    "modular_lora": {"steps": 2},
    "spm": {"steps": 2, "anchoring": 0.0},
}
RATE = 10.0
TIMES = {"at once": 0.9, "after a look": 2}  # when it is split -> what a device has, by what is to be kept


def pipeline(name):
    """The UNet of `stand_in`, which compiles sooner; for SPM a real one, whose layers it adds to."""
    real = tiny.pipeline("sd")
    return real if name == "spm" else stand_in.pipeline(real)


def results(name):
    """What a method changed: the weights, or what it attached."""
    options = smallest.options(METHODS[name], TRAINED[name])
    aligned = METHODS[name].align(pipeline(name), CONCEPT, seed=0, **options)
    kernels = [delta.kernels for delta in aligned.attached]
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves((aligned.params["unet"], kernels))]


def norm(leaves):
    return float(np.sqrt(sum(np.square(leaf).sum() for leaf in leaves)))


def apart(name, a, b):
    """The distance of two results, by how far one of them has gone."""
    start = jax.tree.leaves(pipeline(name).params["unet"])
    moved = [x - y for x, y in zip(b, start, strict=False)] + b[len(start) :]
    return norm([x - y for x, y in zip(a, b, strict=True)]) / norm(moved)


def bytes_on_one(make):
    """In the place of `needed_bytes`: as if one device could never hold a program, and several could."""
    return 10**12 if len(jax.tree.leaves(make().input_shardings)[0].device_set) == 1 else 1


def on_four(*names):
    """case -> what was found; for a process with four devices."""
    mesh_lib.SMALL = 16  # so that leaves of this size are split
    found, fitting, plenty, needed = {}, loop.fitting, loop.limit_here, loop.needed_bytes

    def watched(*arguments):
        way = fitting(*arguments)
        seen.append((way, arguments[2]))
        return way

    loop.fitting = watched
    adam = loop.transform
    for name in names:
        # Adam takes full steps where a gradient is hardly more than rounding, as that of the real UNet's queries is.
        loop.transform = (lambda _: optax.sgd(RATE, momentum=0.9)) if name == "spm" else adam
        seen = []
        alone = results(name)
        assert seen and not any(way.fsdp for way, _ in seen)
        least = min(whole.fixed_bytes(None) for _, whole in seen)
        for when, share in TIMES.items():
            limit, seen = int(share * least), []
            loop.limit_here, loop.needed_bytes = lambda _, limit=limit: limit, bytes_on_one
            with compilations() as programs:
                split = results(name)
            held = [kept for _, kept in seen]
            found[f"{name} {when}"] = {
                "fsdp": [way.fsdp for way, _ in seen],
                "at once": [mesh_lib.split_over(kept) is not None for kept in held],
                "apart": apart(name, split, alone),
                "steps": sum("update" in each for each in programs) / len(seen),
                "share": max(kept.fixed_bytes(mesh_lib.make()) / kept.fixed_bytes(None) for kept in held),
            }
        loop.limit_here, loop.needed_bytes = plenty, needed
    return {"devices": jax.device_count(), "found": found}


@pytest.mark.parametrize("names", [["esd", "salun", "modular_lora"], pytest.param(["spm"], marks=pytest.mark.slow)])
def test_what_fits_no_device_is_split_over_several(names):
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    env["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    code = f"import json; from tests.methods.test_split import on_four; print(json.dumps(on_four(*{names})))"
    folder = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    said = json.loads(run.stdout.splitlines()[-1])
    assert said["devices"] == 4 and list(said["found"]) == [f"{name} {when}" for name in names for when in TIMES]
    for key, found in said["found"].items():
        assert len(found["fsdp"]) == (2 if "salun" in key else 1) and all(found["fsdp"]), (key, found)
        assert set(found["at once"]) == {key.endswith("at once")}, (key, found)
        assert found["steps"] <= 2 and found["share"] < 0.6 and found["apart"] < 1e-4, (key, found)
