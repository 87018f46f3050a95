"""Fine-tuning of flow transformers in PyTorch, as diffusers' DreamBooth scripts of SD3 and FLUX train them.

VAE, text encoders, noise levels, adapters and optimiser are diffusers', transformers', PEFT's and PyTorch's. What is
random comes from our side (`Noising.draw`, the adapters' first weights).
"""

import copy
import re
from collections.abc import Callable, Sequence

import diffusers
import jax
import numpy as np
import peft
import torch

from spqr_jax import backbones, data, finetune
from spqr_jax.params import flatten
from tests.parity import test_finetune as unet
from tests.parity.test_finetune import ALPHA, BATCH, RANK, SEED, STEPS

# What the profiles train, in PyTorch's names.
MODERATE = re.compile(r"^transformer_blocks\.\d+\.attn\.(add_k_proj|add_v_proj|to_add_out)\.")
LITE = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT_STREAM = ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]

# (pipe, noisy latents [B, C, h, w], times [B], captions) -> the transformer's output [B, C, h, w]
Predict = Callable[..., torch.Tensor]


def images(captions: Sequence[str], size: tuple[int, int]) -> data.Dataset:
    pixels = np.random.default_rng(0).integers(0, 256, (len(captions), *size, 3), np.uint8)
    return data.from_arrays(pixels, captions)


def optimiser(norm: float) -> finetune.Optimiser:
    """A short warm-up, a rate that moves the loss within ten steps, and a norm that clips some steps and not others."""
    return finetune.Optimiser(lr=2e-3, warmup_steps=4, max_grad_norm=norm)


def trainable(pipeline, model, profile: str, joint_text: bool) -> list:
    """Freeze a transformer but for the profile; the parameters to train."""
    model.requires_grad_(profile == "standard")
    if profile == "moderate":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(bool(MODERATE.search(name)))
    if profile == "lite":
        targets = LITE + (TEXT_STREAM if joint_text else [])
        model.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=targets))
        options = {"rank": RANK, "alpha": ALPHA, "dropout": 0.0, "seed": SEED, "joint_text": joint_text}
        ours = flatten(finetune.prepare(pipeline, "lite", **options)[1])
        ours = {re.sub(r"\.lora\.(lora_.)\.kernel", r".\1.default.weight", p): x for p, x in ours.items()}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data = torch.tensor(np.asarray(ours.pop(name)).T.copy())
        assert not ours, "we train adapters that PEFT does not"
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def encoded(pipe, dataset: data.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of the shifted and scaled latents, [N, h, w, C] each."""
    pixels = torch.tensor(dataset.images(np.arange(len(dataset)))).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        posterior = pipe.vae.encode(pixels).latent_dist
    config = pipe.vae.config
    mean, std = (posterior.mean - config.shift_factor) * config.scaling_factor, posterior.std * config.scaling_factor
    return mean.permute(0, 2, 3, 1).numpy(), std.permute(0, 2, 3, 1).numpy()


def run(pipe, pipeline, dataset, o, profile: str, predict: Predict, joint_text: bool = False):
    """(transformer after STEPS steps, losses, gradient norms)."""
    mean, std = encoded(pipe, dataset)
    pipe = copy.deepcopy(pipe)
    learned = trainable(pipeline, pipe.transformer, profile, joint_text)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    noising = backbones.of(pipeline).noising

    def losses():
        for i, rows in enumerate(unet.shuffled(dataset)):
            key = jax.random.fold_in(jax.random.key(SEED), i)
            drawn = noising.draw(key, mean[rows], std[rows], scheduler.sigmas.numpy())
            latents, noise, times = (torch.tensor(np.asarray(x)) for x in drawn)
            latents, noise = latents.permute(0, 3, 1, 2), noise.permute(0, 3, 1, 2)
            indices = [int((scheduler.timesteps - t).abs().argmin()) for t in times]
            sigmas = scheduler.sigmas[indices].reshape(-1, 1, 1, 1)
            noisy = (1.0 - sigmas) * latents + sigmas * noise
            output = predict(pipe, noisy, scheduler.timesteps[indices], [dataset.captions[row] for row in rows])
            yield ((output - (noise - latents)) ** 2).reshape(len(rows), -1).mean(1).mean()

    found, norms, _ = unet.descend(learned, o, losses())
    return pipe.transformer, found, norms


def compare(pipe, pipeline, dataset, o, profile: str, predict: Predict, joint_text: bool = False):
    """(our fine-tuned pipeline, PyTorch's transformer), after making sure that every step and the weights agree."""
    model, losses, norms = run(pipe, pipeline, dataset, o, profile, predict, joint_text)
    tuned, progress = unet.our_run(pipeline, dataset, profile, optimiser=o, joint_text=joint_text)
    np.testing.assert_allclose([p.loss for p in progress], losses, rtol=1e-5)
    np.testing.assert_allclose([p.grad_norm for p in progress], norms, rtol=1e-3)
    assert len(losses) == STEPS and len(losses) * BATCH > len(dataset)
    assert min(norms[1:]) < o.max_grad_norm < max(norms[1:]), f"the clip must be seen at work, and not always: {norms}"
    unet.check_updates("transformer", pipeline, tuned, model)
    assert all(tuned.params[name] is pipeline.params[name] for name in set(pipeline.params) - {"transformer"})
    return tuned, model
