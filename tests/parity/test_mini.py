"""The shipped emoji-world model: diffusers on PyTorch loads the same directory and draws the same picture."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import jax

import convert
from spqr_jax import generate, mini

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def both():
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(
        mini.model_path(), local_files_only=True, torch_dtype=torch.float32
    )
    theirs.set_progress_bar_config(disable=True)
    return theirs, convert.load(mini.model_path())


def relative_error(ours, theirs) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def test_every_part_to_1e5(both):
    theirs, ours = both
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, 16, 8, 8)).astype(np.float32)
    t = np.array([3, 801])
    ids = theirs.tokenizer(
        ["a noto emoji of fox on a pink background", ""], padding="max_length", return_tensors="np"
    ).input_ids
    part = {name: ours.definitions[name].bind(ours.params[name]) for name in ours.params}
    nchw, nhwc = (0, 3, 1, 2), (0, 2, 3, 1)
    with torch.no_grad(), jax.default_matmul_precision("highest"):
        context = theirs.text_encoder(torch.tensor(ids)).last_hidden_state
        assert relative_error(part["text_encoder"](ids).last_hidden_state, context) <= 1e-5
        noise = theirs.unet(torch.tensor(latents), torch.tensor(t), context).sample
        assert relative_error(part["unet"](latents.transpose(nhwc), t, context.numpy()).transpose(nchw), noise) <= 1e-5
        pixels = theirs.vae.decode(torch.tensor(latents)).sample
        assert relative_error(part["vae"].decode(latents.transpose(nhwc)).transpose(nchw), pixels) <= 1e-5


def test_the_same_picture(both):
    theirs, ours = both
    prompts = ["a noto emoji of fox on a pink background", "pineapple, twemoji emoji, blue background"]
    latents = np.random.default_rng(1).standard_normal((2, 8, 8, 16)).astype(np.float32)
    expected = theirs(
        prompts,
        num_inference_steps=8,
        guidance_scale=4.0,
        latents=torch.tensor(latents.transpose(0, 3, 1, 2)),
        output_type="np",
    ).images
    with jax.default_matmul_precision("highest"):
        found = generate.generate(ours, prompts, [0, 1], steps=8, guidance=4.0, scheduler="dpmpp", latents=latents)
    assert np.abs(found / 255 - expected).max() <= 0.5 / 255 + 1e-4
