"""Blocks and whole models against diffusers and transformers on PyTorch, same random weights, float32."""

import jax
import pytest

torch = pytest.importorskip("torch")

import convert
from spqr_jax import params as params_lib
from tests.parity import blocks, compared

jax.config.update("jax_default_matmul_precision", "highest")
KINDS = ["sd1", "sd2", "sdxl"]
PROMPTS = ["a cat", "nude", ""]


def check(rows: list[compared.Compared]) -> None:
    assert rows and not [row for row in rows if not row.error <= row.limit]


@pytest.fixture(scope="module")
def pipelines(reference):
    """kind -> (diffusers pipeline, ours)."""
    return {kind: (reference(kind)[0], convert.load(reference(kind)[1])) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_the_unet(pipelines, kind):
    rows = blocks.of_unet(*pipelines[kind], kind)
    check(rows)
    assert {row.block for row in rows} >= blocks.UNET_BLOCKS


@pytest.mark.parametrize("kind", KINDS)
def test_unet(pipelines, kind):
    check(compared.unet(*pipelines[kind], kind))


def test_unet_of_latents_that_do_not_halve_evenly(pipelines):
    check(compared.unet(*pipelines["sd1"], "sd1", side=(9, 7)))


def test_blocks_of_the_vae(pipelines):
    rows = blocks.of_vae(*pipelines["sd1"], "sd1")
    check(rows)
    assert {row.block for row in rows} >= blocks.VAE_BLOCKS


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_the_text_encoders(pipelines, kind):
    rows = blocks.of_text_encoders(*pipelines[kind], kind, PROMPTS)
    check(rows)
    assert {row.block for row in rows} >= blocks.TEXT_BLOCKS


def test_a_block_that_is_wrong_is_found(pipelines):
    """One weight of one resnet, one part in a thousand: the blocks that hold it fail, the others do not."""
    pipe, pipeline = pipelines["sd1"]
    path = "mid_block.resnets.1.conv1.kernel"
    unet = params_lib.map_with_path(lambda p, leaf: leaf * 1.001 if p == path else leaf, pipeline.params["unet"])
    rows = blocks.of_unet(pipe, pipeline.with_params(unet=unet), "sd1")
    wrong = {row.block for row in rows if row.error > row.limit}
    assert wrong == {"Conv2d", "ResnetBlock2D", "UNetMidBlock2DCrossAttn"}


@pytest.mark.parametrize("kind", KINDS)
def test_text_encoders(pipelines, kind):
    check(compared.text_encoders(*pipelines[kind], kind, PROMPTS))


def test_vae(pipelines):
    check(compared.vae(*pipelines["sd1"], "sd1"))


def test_formulations_of_convolution_and_attention():
    check(compared.formulations())


@pytest.mark.slow
def test_the_whole_unet_of_sd15():
    check(compared.sd15_unet())


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_through_diffusers(reference, kind, tmp_path):
    """load -> save_diffusers -> diffusers gives the same weights, bit for bit."""
    torch_pipe, directory = reference(kind)
    convert.save_diffusers(convert.load(directory), tmp_path)
    again = type(torch_pipe).from_pretrained(tmp_path, local_files_only=True)
    for component in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if not hasattr(torch_pipe, component):
            continue
        ours, theirs = getattr(again, component).state_dict(), getattr(torch_pipe, component).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    ids = [p.tokenizer("a cat eats the dog").input_ids for p in (again, torch_pipe)]
    assert ids[0] == ids[1]


def test_sd15_unet_has_the_published_parameter_count():
    from spqr_jax import backbones

    config = {"cross_attention_dim": 768}  # every other field at its default is SD1.5's
    _, shapes = backbones.define("unet", config)
    assert params_lib.count(shapes) == 859_520_964
