"""Whole samples against diffusers' pipelines on PyTorch: same weights, prompts and initial latents, 20 steps."""

import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import convert
from spqr_jax.generate import generate

jax.config.update("jax_default_matmul_precision", "highest")
STEPS = 20
PROMPTS = ["a cat eats the dog", "nude"]
SCHEDULERS = {
    "pndm": "PNDMScheduler",
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpmpp": "DPMSolverMultistepScheduler",
}
# The rest of the grid, which takes a compilation each, is slow.
CASES = [("sd1", s) for s in SCHEDULERS] + [("sd2", "ddim"), ("sd2", "dpmpp"), ("sdxl", "euler"), ("sdxl", "pndm")]
REST = [(kind, s) for kind in ("sd2", "sdxl") for s in SCHEDULERS if (kind, s) not in CASES]


def load(directory):
    """The pipeline with clip_sample=False, as in every Stable Diffusion repository's scheduler_config.json: clipping
    latents to [-1, 1] makes sampling chaotic, PyTorch's own float32 and float64 then differ by 6e-3."""
    pipeline = convert.load(directory)
    scheduler = pipeline.configs["scheduler"] | {"clip_sample": False}
    return pipeline._replace(configs=pipeline.configs | {"scheduler": scheduler})


def noise(count: int, height: int = 8, width: int = 8) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, height, width, 4)).astype(np.float32)


def diffusers_images(pipe, scheduler: str, latents: np.ndarray | None, prompts=PROMPTS, **options) -> np.ndarray:
    """float32 [N, H, W, 3] in [0, 1], before rounding."""
    own = pipe.scheduler
    # From the fields as they stand in scheduler_config.json: within a process diffusers also remembers which of them
    # were left at their default, and replaces those.
    config = json.loads(own.to_json_string()) | {"clip_sample": False}
    pipe.scheduler = getattr(diffusers, SCHEDULERS[scheduler]).from_config(config)
    options = {"guidance_scale": 7.5, "num_inference_steps": STEPS, "output_type": "np"} | options
    if latents is not None:
        options["latents"] = torch.tensor(latents.transpose(0, 3, 1, 2))
    try:
        return pipe(prompts, **options).images
    finally:
        pipe.scheduler = own


def check_equal(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Equal to 1e-4 before rounding, seen after it.

    `ours` is rounded, so it may be half a grey level and 1e-4 from `theirs`; a constant error of 1e-4 would then show
    in 2.5 % of the values rounded to another level.
    """
    assert ours.dtype == np.uint8 and ours.shape == theirs.shape
    assert theirs.std() > 0.02, "the reference is a flat picture and proves nothing"
    assert np.abs(ours / 255.0 - theirs).max() <= 0.5 / 255 + 1e-4
    assert (ours != np.round(theirs * 255)).mean() <= 0.025


def check_sample(reference, kind: str, scheduler: str) -> None:
    pipe, directory = reference(kind)
    theirs = diffusers_images(pipe, scheduler, noise(2))
    ours = generate(load(directory), PROMPTS, [0, 0], steps=STEPS, scheduler=scheduler, latents=noise(2))
    check_equal(ours, theirs)


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
    """One picture at a time in diffusers; batches of two here, so that the last one is padded too."""
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
    """Seeds of a published prompt file, one torch.Generator a picture."""
    pipe, directory = reference("sd1")
    seeds = [4290749014, 7]
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    theirs = diffusers_images(pipe, "ddim", None, generator=generators)
    ours = generate(load(directory), PROMPTS, seeds, steps=STEPS, scheduler="ddim", noise="torch")
    check_equal(ours, theirs)


def test_latents_that_do_not_halve_evenly(reference):
    """Latents of 9x7: the UNet's way up must choose the pixels that PyTorch's nearest neighbour chooses."""
    pipe, directory = reference("sd1")
    pipeline = load(directory)
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((1, 9, 7, 4)).astype(np.float32)
    context = rng.standard_normal((1, 77, 32)).astype(np.float32)
    with torch.no_grad():
        theirs = pipe.unet(torch.tensor(latents.transpose(0, 3, 1, 2)), 500, torch.tensor(context)).sample.numpy()
    model = pipeline.definitions["unet"].bind(pipeline.params["unet"])
    ours = np.asarray(model(latents, np.array([500]), context)).transpose(0, 3, 1, 2)
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()
