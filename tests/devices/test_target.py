"""The target of a program: what a model is told is what its programs are compiled for."""

import ast
from pathlib import Path

import jax
import numpy as np
import pytest

import convert
from spqr_jax import backbones, mini
from spqr_jax.devices import mesh as mesh_lib
from spqr_jax.devices import target as target_lib
from spqr_jax.devices.target import Target
from tests import tiny

MODELS = Path(backbones.__file__).parent / "models"


def lowered(pipeline, platform: str) -> str:
    """The UNet's program for a platform, as text."""
    unet, weights = pipeline.definitions["unet"], pipeline.params["unet"]
    inputs = (np.zeros(shape, np.float32) for shape in ((1, 8, 8, 4), (1,), (1, tiny.LENGTH, tiny.WIDTH)))
    program = jax.jit(lambda params, *args: unet.bind(params)(*args)).trace(weights, *inputs)
    return program.lower(lowering_platforms=(platform,)).as_text()


def test_a_process_and_its_mesh_have_the_same_target():
    assert target_lib.here().platform == target_lib.of(mesh_lib.make()).platform
    assert (jax.default_backend() == "cpu") == (target_lib.here() == Target("cpu"))


def test_a_model_is_compiled_for_what_it_is_told():
    """On a CPU small convolutions become products; for a TPU that is not there they stay convolutions."""
    pipeline = tiny.pipeline()
    pipeline = backbones.told(pipeline._replace(definitions={"unet": pipeline.definitions["unet"]}), Target("cpu"))
    there = backbones.told(pipeline, Target("tpu"))
    convolutions = lowered(there, "tpu").count("stablehlo.convolution")
    assert convolutions > 10 and not lowered(pipeline, "cpu").count("stablehlo.convolution")
    assert pipeline.definitions["unet"] != there.definitions["unet"]  # so compiled programs are never mixed up
    assert backbones.told(there, Target("cpu")).definitions == pipeline.definitions


@pytest.mark.parametrize("file", sorted(MODELS.glob("*.py")), ids=lambda file: file.name)
def test_no_layer_asks_what_the_process_runs_on(file):
    names = {node.attr for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)}
    assert not names & {"default_backend", "devices", "local_devices", "device_count"}


def test_only_the_chips_of_a_tpu_are_told_to_a_model(monkeypatch):
    """Elsewhere the compiler divides a program by itself, and the models stay as they are."""
    pipeline, mesh = convert.load(mini.model_path()), mesh_lib.make()
    assert backbones.on(pipeline, mesh) is pipeline
    chips = Target("tpu", mesh)
    monkeypatch.setattr(target_lib, "of", lambda _: chips)
    assert backbones.on(pipeline, mesh).definitions == backbones.told(pipeline, chips).definitions
    assert backbones.on(pipeline, mesh).definitions["unet"] != pipeline.definitions["unet"]
