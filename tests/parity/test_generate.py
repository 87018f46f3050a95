"""Whole samples against diffusers' pipelines on PyTorch: same weights, prompts and initial latents, 20 steps."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import convert
from spqr_jax.generate import generate
from tests.parity import samples
from tests.parity.samples import PROMPTS, SCHEDULERS, STEPS, diffusers_images, load, noise

jax.config.update("jax_default_matmul_precision", "highest")
# The rest of the grid, which takes a compilation each, is slow.
CASES = [("sd1", "pndm"), ("sd2", "ddim"), ("sd2", "dpmpp"), ("sdxl", "pndm")]
REST = [(kind, s) for kind in ("sd1", "sd2", "sdxl") for s in SCHEDULERS if (kind, s) not in CASES]


def check_equal(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Equal to 1e-4 before rounding, seen after it (`samples.apart`)."""
    assert ours.dtype == np.uint8 and theirs.std() > 0.02, "the reference is a flat image and proves nothing"
    beyond, regraded = samples.apart(ours, theirs)
    assert beyond <= samples.PIXELS and regraded <= samples.REGRADED


def check_sample(reference, kind: str, scheduler: str) -> None:
    rows = samples.sample(*reference(kind), kind, scheduler)
    assert not [row for row in rows if not row.error <= row.limit]


@pytest.mark.parametrize(("kind", "scheduler"), CASES)
def test_whole_sample(reference, kind, scheduler):
    check_sample(reference, kind, scheduler)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "scheduler"), REST)
def test_whole_sample_of_the_rest_of_the_grid(reference, kind, scheduler):
    check_sample(reference, kind, scheduler)


@pytest.mark.parametrize(("kind", "scheduler"), [("sd1", "ddim"), ("sdxl", "euler")])
def test_negative_prompt(reference, kind, scheduler):
    pipe, directory = reference(kind)
    theirs = diffusers_images(pipe, scheduler, noise(2), negative_prompt=["dog", "dog"])
    pipeline = load(directory)
    options = {"steps": STEPS, "scheduler": scheduler, "latents": noise(2)}
    ours = generate(pipeline, PROMPTS, [0, 0], negative="dog", **options)
    check_equal(ours, theirs)
    assert (ours != generate(pipeline, PROMPTS, [0, 0], **options)).mean() > 0.1


@pytest.mark.slow
def test_sdxl_without_a_negative_prompt_takes_zeros_where_its_index_says_so(reference, tmp_path):
    """force_zeros_for_empty_prompt, True in published SDXL repositories and in files that do not say; kept by
    save_diffusers. The reference pipeline of the other tests says False."""
    pipe, _ = reference("sdxl")
    forced = diffusers.StableDiffusionXLPipeline(**pipe.components, force_zeros_for_empty_prompt=True)
    forced.set_progress_bar_config(disable=True)
    forced.save_pretrained(tmp_path / "forced")
    theirs = diffusers_images(forced, "euler", noise(2))
    convert.save_diffusers(convert.load(tmp_path / "forced"), tmp_path / "saved")
    again = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "saved", local_files_only=True)
    assert again.config.force_zeros_for_empty_prompt is True
    pipeline = load(tmp_path / "saved")
    check_equal(generate(pipeline, PROMPTS, [0, 0], steps=STEPS, scheduler="euler", latents=noise(2)), theirs)
    assert np.abs(theirs - diffusers_images(pipe, "euler", noise(2))).max() > 0.1


def test_save_diffusers_keeps_force_zeros_false(reference, tmp_path):
    _, directory = reference("sdxl")
    convert.save_diffusers(convert.load(directory), tmp_path)
    again = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path, local_files_only=True)
    assert again.config.force_zeros_for_empty_prompt is False


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_guidance_of_one_or_less_is_off(reference, scale):
    pipe, directory = reference("sd1")
    theirs = diffusers_images(pipe, "ddim", noise(2), guidance_scale=scale)
    options = {"steps": STEPS, "scheduler": "ddim", "latents": noise(2)}
    check_equal(generate(load(directory), PROMPTS, [0, 0], guidance=scale, **options), theirs)


def test_each_prompt_has_its_own_guidance(reference):
    """One image at a time in diffusers; batches of two here, so that the last one is padded too."""
    pipe, directory = reference("sd1")
    prompts, scales, latents = ["a cat", "a dog", "nude"], [7.5, 0.5, 3.0], noise(3)
    theirs = np.concatenate(
        [
            diffusers_images(pipe, "ddim", latents[i : i + 1], prompts[i], guidance_scale=scales[i])
            for i in range(len(prompts))
        ]
    )
    options = {"steps": STEPS, "scheduler": "ddim", "latents": latents, "batch_size": 2}
    check_equal(generate(load(directory), prompts, [0, 0, 0], guidance=scales, **options), theirs)


def test_another_size(reference):
    pipe, directory = reference("sd1")
    latents = noise(1, 12, 16)
    theirs = diffusers_images(pipe, "ddim", latents, ["a cat"], height=24, width=32)
    options = {"steps": STEPS, "scheduler": "ddim", "latents": latents}
    check_equal(generate(load(directory), ["a cat"], [0], height=24, width=32, **options), theirs)


def test_torch_noise_reproduces_a_seeded_pytorch_run(reference):
    """Seeds of a published prompt file, one torch.Generator an image."""
    pipe, directory = reference("sd1")
    seeds = [4290749014, 7]
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    theirs = diffusers_images(pipe, "ddim", None, generator=generators)
    ours = generate(load(directory), PROMPTS, seeds, steps=STEPS, scheduler="ddim", noise="torch")
    check_equal(ours, theirs)
