"""Whole samples against diffusers' pipelines: same initial latents, same scheduler, images compared."""

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

import convert
from spqr_jax.generate import generate
from spqr_jax.pipeline import Pipeline
from tests.parity.compared import Compared

STEPS = 20
PROMPTS = ["a cat eats the dog", "nude"]
SCHEDULERS = {
    "pndm": "PNDMScheduler",
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpmpp": "DPMSolverMultistepScheduler",
}
# A constant error of PIXELS, of pixels in [0, 1], would show in REGRADED of the values rounded to another level.
PIXELS, REGRADED = 1e-4, 0.025


def load(directory: Path) -> Pipeline:
    """The pipeline with clip_sample=False, as in every Stable Diffusion repository's scheduler_config.json: clipping
    latents to [-1, 1] makes sampling chaotic, PyTorch's own float32 and float64 then differ by 6e-3."""
    pipeline = convert.load(directory)
    scheduler = pipeline.configs["scheduler"] | {"clip_sample": False}
    return pipeline._replace(configs=pipeline.configs | {"scheduler": scheduler})


def noise(count: int, height: int = 8, width: int = 8) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, height, width, 4)).astype(np.float32)


def diffusers_images(pipe: Any, scheduler: str, latents: np.ndarray | None, prompts=PROMPTS, **options) -> np.ndarray:
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


def apart(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """How far images_u8 are from the reference before rounding, [0, 1]: (largest difference beyond the half grey level
    that rounding may make, share of values on another grey level than the reference's).

    Divided by 255 the share estimates the mean difference: a value changes its level with 255 times the probability.
    """
    assert ours.shape == theirs.shape, f"shape {ours.shape}, expected {theirs.shape}"
    beyond = float(np.abs(ours / 255.0 - theirs).max()) - 0.5 / 255
    return max(beyond, 0.0), float((ours != np.round(theirs * 255)).mean())


def flow_noise(count: int, height: int = 8, width: int = 8) -> np.ndarray:
    """Latents of 16 channels."""
    return np.random.default_rng(0).standard_normal((count, height, width, 16)).astype(np.float32)


def diffusers_flow_images(pipe: Any, latents: np.ndarray, **options) -> np.ndarray:
    """float32 [N, H, W, 3] in [0, 1], before rounding, of SD3's pipeline. Latents are half the size of images."""
    size = {"height": 2 * latents.shape[1], "width": 2 * latents.shape[2]}
    options = {"guidance_scale": 5.0, "output_type": "np", **size} | options
    return pipe(PROMPTS, latents=torch.tensor(latents.transpose(0, 3, 1, 2)), **options).images


def flow_sample(pipe: Any, pipeline: Pipeline, kind: str, steps: int) -> list[Compared]:
    """Two images of SD3 in `steps` steps with guidance, at the usual length of texts."""
    theirs = diffusers_flow_images(pipe, flow_noise(2), num_inference_steps=steps)
    assert theirs.std() > 0.02, "the reference is a flat image and proves nothing"
    options = {"scheduler": "flow_euler", "guidance": 5.0, "latents": flow_noise(2)}
    ours = generate(pipeline, PROMPTS, [0, 0], steps=steps, **options)
    return rows("FlowMatchEulerDiscreteScheduler", kind, steps, ours, theirs)


def rows(scheduler: str, kind: str, steps: int, ours: np.ndarray, theirs: np.ndarray) -> list[Compared]:
    """The entries of a sample in the table. ours: images_u8. theirs: float32 in [0, 1], before rounding."""
    beyond, regraded = apart(ours, theirs)
    name, size = f"sample, {scheduler}", theirs.size
    return [
        Compared(f"{name}: largest, {steps} steps", kind, beyond, PIXELS, size),
        Compared(f"{name}: mean, {steps} steps", kind, regraded / 255, REGRADED / 255, size, 1 / size / 255),
    ]


def sample(pipe: Any, directory: Path, kind: str, scheduler: str) -> list[Compared]:
    """Two images in STEPS steps with guidance."""
    theirs = diffusers_images(pipe, scheduler, noise(2))
    assert theirs.std() > 0.02, "the reference is a flat image and proves nothing"
    ours = generate(load(directory), PROMPTS, [0, 0], steps=STEPS, scheduler=scheduler, latents=noise(2))
    beyond, regraded = apart(ours, theirs)
    name, steps = f"sample, {SCHEDULERS[scheduler]}", f"{STEPS} steps"
    return [
        Compared(f"{name}: largest, {steps}", kind, beyond, PIXELS, theirs.size),
        Compared(f"{name}: mean, {steps}", kind, regraded / 255, REGRADED / 255, theirs.size, 1 / theirs.size / 255),
    ]
