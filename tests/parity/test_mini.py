"""The shipped emoji-world model: diffusers on PyTorch loads the same directory and draws the same image."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import jax

import convert
from spqr_jax import generate, mini
from tests.parity import compared

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def both():
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(
        mini.model_path(), local_files_only=True, torch_dtype=torch.float32
    )
    theirs.set_progress_bar_config(disable=True)
    return theirs, convert.load(mini.model_path())


def test_every_part_to_1e5(both):
    with jax.default_matmul_precision("highest"):
        rows = compared.unet(*both, "emoji world") + compared.vae(*both, "emoji world")
        rows += compared.text_encoders(*both, "emoji world", ["a noto emoji of fox on a pink background", ""])
    assert not [row for row in rows if not row.error <= row.limit]


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
