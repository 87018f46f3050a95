"""Generation's own promises: noise, batches, devices, and what it refuses. Parity with diffusers: tests/parity."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import convert
from spqr_jax import generate as generate_lib
from spqr_jax import params as params_lib
from spqr_jax.backbones import text
from spqr_jax.devices import mesh as mesh_lib
from spqr_jax.generate import generate
from spqr_jax.sampling import noise as noise_lib
from spqr_jax.sampling.sampler import check_finite

PROMPTS = ["a cat", "the dog", "nude", "a dog eats", ""]
SEEDS = [3, 1, 4, 1, 2**32 - 1]
OPTIONS = {"steps": 3, "scheduler": "ddim", "batch_size": 2}


@pytest.fixture(scope="module")
def pipeline(reference):
    return convert.load(reference("sd1")[1])


@pytest.fixture(scope="module")
def images(pipeline):
    return generate(pipeline, PROMPTS, SEEDS, **OPTIONS)


def grey_levels(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b).max())


def test_pictures(images):
    """Five pictures in batches of two: the padding of the last batch is cut off."""
    assert images.dtype == np.uint8 and images.shape == (5, 16, 16, 3)
    assert all(image.std() > 2 for image in images)
    assert len({image.tobytes() for image in images}) == 5


def test_the_same_call_gives_the_same_bytes(pipeline, images):
    np.testing.assert_array_equal(generate(pipeline, PROMPTS, SEEDS, **OPTIONS), images)


def test_a_picture_does_not_depend_on_its_batch(pipeline, images):
    """Other batch size, other neighbours, other place: at most one grey level, and noise equal to the bit."""
    other = generate(pipeline, PROMPTS[::-1], SEEDS[::-1], **OPTIONS | {"batch_size": 5})[::-1]
    assert grey_levels(other, images) <= 1


@pytest.mark.parametrize("kind", ["jax", "torch"])
def test_noise_does_not_depend_on_the_batch(kind):
    noise = noise_lib.of_seeds(SEEDS, 5, (8, 8, 4), mesh_lib.make(), kind)
    whole = np.asarray(noise(slice(0, 5), 5))
    parts = np.concatenate([noise(slice(0, 2), 2), noise(slice(2, 3), 1), noise(slice(3, 5), 2)])
    np.testing.assert_array_equal(parts, whole)
    np.testing.assert_array_equal(whole[1], whole[3])  # equal seeds
    assert len({row.tobytes() for row in whole}) == 4


@pytest.mark.parametrize("seeds", [SEEDS, 7], ids=["each", "one"])
def test_noise_of_a_short_batch_is_the_program_of_a_whole_one(seeds):
    """The last batch of a sweep has another number of pictures in every cell: it must not be compiled for each."""
    noise = noise_lib.of_seeds(seeds, 5, (8, 8, 4), mesh_lib.make(), "jax")
    whole = np.asarray(noise(slice(0, 4), 4))
    programs = noise_lib.of_each._cache_size() + noise_lib.of_numbers._cache_size()
    short = np.asarray(noise(slice(3, 5), 4))
    assert noise_lib.of_each._cache_size() + noise_lib.of_numbers._cache_size() == programs
    np.testing.assert_array_equal(short[0], whole[3])
    np.testing.assert_array_equal(short[1:], np.repeat(short[1:2], 3, axis=0))


def test_one_seed_numbers_the_pictures():
    noise = noise_lib.of_seeds(7, 5, (8, 8, 4), mesh_lib.make(), "jax")
    whole = np.concatenate([noise(slice(0, 2), 2), noise(slice(2, 5), 3)])
    expected = [jax.random.normal(jax.random.fold_in(jax.random.key(7), i), (8, 8, 4)) for i in range(5)]
    np.testing.assert_array_equal(whole, np.stack(expected))


def test_noise_is_standard_normal():
    noise = noise_lib.of_each(np.arange(64, dtype=np.uint32), (16, 16, 4))
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01


def test_torch_noise_is_torchs():
    """Not only as torch_randn is tested: in NHWC, one generator a picture."""
    rows = noise_lib.of_seeds(SEEDS, 5, (6, 10, 4), mesh_lib.make(), "torch")(slice(0, 5), 5)
    for row, seed in zip(np.asarray(rows), SEEDS, strict=True):
        expected = torch.randn((1, 4, 6, 10), generator=torch.Generator("cpu").manual_seed(seed))
        np.testing.assert_allclose(row, expected[0].permute(1, 2, 0).numpy(), rtol=0, atol=3e-6)


def test_batches_come_in_order(pipeline, images):
    parts = list(generate_lib.batches(pipeline, PROMPTS, SEEDS, **OPTIONS))
    assert [start for start, _ in parts] == [0, 2, 4] and [len(part) for _, part in parts] == [2, 2, 1]
    np.testing.assert_array_equal(np.concatenate([part for _, part in parts]), images)


def test_no_prompts_no_pictures(pipeline):
    assert generate(pipeline, [], [], height=32, width=16).shape == (0, 32, 16, 3)
    with pytest.raises(ValueError, match="ddpm"):
        generate(pipeline, [], [], scheduler="ddpm")


SCRIPT = """
import sys
import jax, numpy as np
import convert
from spqr_jax import data, finetune
from spqr_jax.generate import generate
directory, prompts, seeds, out = sys.argv[1], eval(sys.argv[2]), eval(sys.argv[3]), sys.argv[4]
assert jax.device_count() == 8
pipeline = convert.load(directory)
np.save(out, generate(pipeline, prompts, seeds, steps=3, scheduler="ddim", batch_size=2))
"""


def test_eight_devices_give_the_pictures_of_one(reference, images, tmp_path):
    """Five prompts on eight devices: the batch is rounded up to eight and padded."""
    assert mesh_lib.make().size == 1, "this test compares with one device"
    out = tmp_path / "images.npy"
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    arguments = [sys.executable, "-c", SCRIPT, str(reference("sd1")[1]), repr(PROMPTS), repr(SEEDS), str(out)]
    run = subprocess.run(arguments, cwd=Path(__file__).parents[1], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert grey_levels(np.load(out), images) <= 1


def spoiled(pipeline, component: str, path: str):
    """The pipeline with one NaN in one leaf."""

    def spoil(name, leaf):
        leaf = np.array(leaf)
        if name == path:
            leaf.flat[0] = np.nan
        return leaf

    return pipeline.with_params(**{component: params_lib.map_with_path(spoil, pipeline.params[component])})


def test_nan_weights_are_named_by_step_and_prompt(pipeline):
    broken = spoiled(pipeline, "unet", "conv_out.bias")
    with pytest.raises(FloatingPointError, match=r"latents after step 1 are not finite for prompt 'a cat'"):
        generate(broken, PROMPTS, SEEDS, **OPTIONS)


def test_a_vae_that_overflows_is_told_apart(pipeline):
    broken = spoiled(pipeline, "vae", "decoder.conv_out.bias")
    with pytest.raises(FloatingPointError, match="decoded pixels are not finite"):
        generate(broken, PROMPTS, SEEDS, **OPTIONS)


def test_the_right_prompt_is_named(pipeline):
    """The fourth of five, in the second batch; pictures before it are delivered."""
    latents = np.zeros((5, 8, 8, 4), np.float32)
    latents[3, 0, 0, 0] = np.inf
    parts = generate_lib.batches(pipeline, PROMPTS, 0, latents=latents, **OPTIONS)
    assert next(parts)[0] == 0
    with pytest.raises(FloatingPointError, match="step 1 are not finite for prompt 'a dog eats'"):
        next(parts)


def test_the_first_bad_step_is_named():
    finite = np.ones((5, 2), bool)  # four steps and the pixels
    finite[2:, 1] = False
    with pytest.raises(FloatingPointError, match="latents after step 3 are not finite for prompt 'b'"):
        check_finite(finite, ["a", "b"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": [1]}, "seeds: expected 5 .* found 1"),
        ({"seeds": [0, 1, 2, 3, -1]}, "seed -1 is outside"),
        ({"seeds": [0, 1, 2, 3, 2**32]}, "seed 4294967296 is outside"),
        ({"seeds": 7, "noise": "torch"}, "needs one seed for each image"),
        ({"noise": "numpy"}, "noise must be"),
        ({"guidance": [1.0, 2.0]}, "guidance must be one finite number or 5"),
        ({"guidance": float("nan")}, "guidance must be one finite number"),
        ({"height": 17}, "multiples of 2, found 17x16"),
        ({"height": 0}, "found 0x16"),
        ({"width": -2}, "found 16x-2"),
        ({"latents": np.zeros((5, 4, 8, 8))}, r"latents must have shape \(5, 8, 8, 4\), found \(5, 4, 8, 8\)"),
        ({"scheduler": "ddpm"}, "ddpm"),
        ({"steps": 0}, "steps"),
        ({"batch_size": 0}, "batch_size must be at least 1, found 0"),
    ],
)
def test_arguments_that_do_not_fit(pipeline, options, message):
    with pytest.raises(ValueError, match=message):
        generate(pipeline, PROMPTS, **({"seeds": SEEDS} | OPTIONS | options))


def test_few_texts_are_encoded_in_few_rows_and_come_out_the_same(pipeline, monkeypatch):
    rows, encode = [], text.encode_ids

    def recorded(definition, params, ids, *options):
        rows.append(len(ids))
        return encode(definition, params, ids, *options)

    monkeypatch.setattr(text, "encode_ids", recorded)
    texts = ["cat", "dog", "bird", "cat", "tree", "sun"]
    states = text.encode(pipeline, texts, batch_size=4)
    alone = text.encode(pipeline, ["cat"])
    assert rows == [4, 4, 8]
    np.testing.assert_allclose(np.asarray(states.hidden)[[0, 3]], np.repeat(alone.hidden, 2, 0), atol=1e-6)
