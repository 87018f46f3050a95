"""The shipped emoji-world models: diffusers on PyTorch loads the same directories and draws the same images."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import jax

import convert
from spqr_jax import generate, mini
from tests.parity import compared

diffusers = pytest.importorskip("diffusers")


PROMPTS = ["a noto emoji of fox on a pink background", "pineapple, twemoji emoji, blue background"]


def latents() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((2, 8, 8, 16)).astype(np.float32)


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
    expected = theirs(
        PROMPTS,
        num_inference_steps=8,
        guidance_scale=4.0,
        latents=torch.tensor(latents().transpose(0, 3, 1, 2)),
        output_type="np",
    ).images
    with jax.default_matmul_precision("highest"):
        found = generate.generate(ours, PROMPTS, [0, 1], steps=8, guidance=4.0, scheduler="dpmpp", latents=latents())
    assert np.abs(found / 255 - expected).max() <= 0.5 / 255 + 1e-4


def test_the_transformer_and_its_picture():
    folder = mini.model_path("transformer")
    theirs = diffusers.StableDiffusion3Pipeline.from_pretrained(
        folder, text_encoder_3=None, tokenizer_3=None, local_files_only=True, torch_dtype=torch.float32
    )
    theirs.set_progress_bar_config(disable=True)
    ours, length = convert.load(folder), mini.TEXT_LENGTHS["transformer"]
    expected = theirs(
        PROMPTS,
        num_inference_steps=8,
        guidance_scale=4.0,
        height=32,
        width=32,
        max_sequence_length=length,
        latents=torch.tensor(latents().transpose(0, 3, 1, 2)),
        output_type="np",
    ).images
    how = {"steps": 8, "guidance": 4.0, "scheduler": "flow_euler", "max_sequence_length": length}
    with jax.default_matmul_precision("highest"):
        rows = compared.sd3(theirs.transformer, ours, "emoji world")
        found = generate.generate(ours, PROMPTS, [0, 1], latents=latents(), **how)
    assert not [row for row in rows if not row.error <= row.limit]
    assert np.abs(found / 255 - expected).max() <= 0.5 / 255 + 1e-4
