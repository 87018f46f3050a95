"""What programs show that are compiled for accelerators which are not there, and for a CPU of four devices.

One block of a UNet for each platform whose compiler is installed, and the whole training step on the CPU. The whole
programs of Stable Diffusion 1.5 take minutes and are marked slow.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from spqr_jax import finetune, generate
from tests import tiny
from tests.compilations import compilations

ROOT = Path(__file__).parents[2]
INSTALLED = {"tpu": "libtpu", "h100": "jax_cuda12_plugin"}
HOW = {"tpu": "pip install 'jax[tpu]'", "h100": "pip install 'jax[cuda12]'"}
# Attention of so many queries may be plain, and so large a part of the FLOP may be left in float32.
MOST_QUERIES, LEFT = 1024, 1e-3


def lines(module: str, target: str, *arguments: str) -> list[dict]:
    """What a module prints for a target, a line of JSON each. Skips where the target's compiler is missing."""
    platform = target.partition("-")[0]
    if platform in INSTALLED and importlib.util.find_spec(INSTALLED[platform]) is None:
        pytest.skip(f"the compiler of {target} is not installed: {HOW[platform]}")
    command = [sys.executable, "-m", f"tests.fit.{module}", target, *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


def check_attention_and_precision(found: dict) -> None:
    assert all(entry["queries"] <= MOST_QUERIES for entry in found["plain"]), found["plain"]
    products = found["products"]
    flop = sum(kind["flop"] for kind in products.values())
    left = products.get("f32", {"convolution": 0, "flop": 0.0, "largest": ""})
    assert not left["convolution"] and left["flop"] <= LEFT * flop, left


@pytest.mark.parametrize(("target", "kernels"), [("tpu-v5e-4", 1), ("h100", 2)])
def test_a_block_of_the_unet_and_its_gradient(target, kernels):
    """Self-attention by a kernel, cross-attention by one too or block by block; one sum of gradients, all donated."""
    (found,) = lines("block", target)
    check_attention_and_precision(found)
    assert found["flash"] == {"forward": kernels, "backward": kernels}
    assert found["donated"] == found["leaves"]
    check_data_parallel(found["collectives"], found["elements"], 1 if target == "h100" else 4)


def check_data_parallel(collectives: dict, elements: int, devices: int) -> None:
    """Nothing but sums, which carry each gradient once, in bfloat16 or float32, and a few numbers."""
    assert set(collectives) == ({"all-reduce"} if devices > 1 else set()), collectives
    if devices > 1:
        sums = collectives["all-reduce"]
        assert sums["number"] <= 2 and 2 * elements <= sums["bytes"] <= 4 * elements + 1024, (sums, elements)


def test_the_step_on_four_devices_of_a_cpu():
    """One sum of all gradients, and under fsdp each weight gathered once; the whole state is donated."""
    whole, split = lines("compiled", "cpu", "small-8", "float32", "standard", "standard-fsdp")
    assert whole["hlo"]["collectives"] == {"all-reduce": {"number": 1, "bytes": 4 * whole["elements"] + 4}}
    assert whole["hlo"]["donated"] == split["hlo"]["donated"] == 3 * whole["leaves"] + 2  # weights, moments, counters
    gathered = split["hlo"]["collectives"]["all-gather"]
    assert 0.9 * 4 * split["elements"] <= gathered["bytes"] <= 4 * split["elements"]
    assert split["parts"]["arguments"] < 0.3 * whole["parts"]["arguments"]


def test_guided_sampling_on_four_devices_of_a_cpu_moves_nothing():
    (found,) = lines("compiled", "cpu", "small-8", "float32", "evaluation")
    check_data_parallel(found["hlo"]["collectives"], 0, 1)


def test_split_weights_are_gathered_in_the_type_of_the_computation():
    """On eight GPUs each weight crosses once in bfloat16, and so does its gradient, which is summed where it stays."""
    (split,) = lines("compiled", "h100-8", "small-8", "bfloat16", "standard-fsdp")
    found, whole = split["hlo"]["collectives"], 2 * split["elements"]
    assert 0.9 * whole <= found["all-gather"]["bytes"] <= whole, found
    assert 0.9 * whole <= found["reduce-scatter"]["bytes"] <= whole, found
    assert found["all-reduce"]["bytes"] < 0.05 * whole, found  # leaves that are too small to be split


def test_step_and_sampler_compile_once_for_all_subjects():
    first, data = tiny.pipeline(real=False), tiny.dataset(6)
    second = first._replace(params=first.params | {"unet": jax.tree.map(lambda x: 2 * x, first.params["unet"])})
    with compilations() as names:
        for subject in (first, second):
            adapted = finetune.train(subject, data, "standard", steps=2, batch_size=3, seed=5)
            for drawn in (subject, finetune.apply(subject, adapted)):
                generate.generate(drawn, ["a cat"] * 3, [1, 2, 3], steps=2, scheduler="ddim", batch_size=3)
    for program in ("step", "sample"):
        assert sum(program in name for name in names) == 1, names


STABLE_DIFFUSION = {
    "h100": ("text", "images", "sampler", "lite", "moderate", "standard"),
    "tpu-v5e-4": ("text", "images", "evaluation", "decoder", "moderate"),
}


@pytest.mark.slow
@pytest.mark.parametrize("target", STABLE_DIFFUSION)
def test_every_program_of_stable_diffusion(target):
    for found in lines("compiled", target, "weights/stable-diffusion-v1-5", "bfloat16", *STABLE_DIFFUSION[target]):
        assert found["compiles"], (found["name"], found["reason"])
        check_attention_and_precision(found["hlo"])
        if found["name"] == "standard":
            assert found["hlo"]["donated"] == 3 * found["leaves"] + 2
        if found["name"] in ("sampler", "evaluation", "decoder"):
            check_data_parallel(found["hlo"]["collectives"], 0, 1)  # none at all
