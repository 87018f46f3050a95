"""Fine-tuning as diffusers' training scripts do it, on PyTorch: the reference that benchmarks run beside ours.

train_text_to_image.py for the whole UNet, train_text_to_image_lora.py (PEFT) for adapters, at the paper's settings
(Tables B and C): AdamW (fused), constant rate after warm-up, gradients clipped, VAE and text encoder inside the loop.
What Accelerate adds on one device is left out; it costs time and changes nothing.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import diffusers
import numpy as np
import peft
import torch

LR, WARMUP, WEIGHT_DECAY, CLIP = 1e-4, 500, 1e-2, 1.0
RANK, ALPHA, DROPOUT = 8, 16, 0.1
CROSS_ATTENTION = ("attn2.to_k", "attn2.to_v", "attn2.to_out")


class Adapters(NamedTuple):
    """The adapters of "lite" where they may differ from Table C: dropout, and what A starts from, as ours name it."""

    dropout: float = DROPOUT
    init: str = "kaiming"


PAPER = Adapters()


def trainable(unet: Any, profile: str, adapters: Adapters = PAPER) -> list[torch.nn.Parameter]:
    """Freeze the UNet but for the profile; LoRA adapters are added for "lite"."""
    unet.requires_grad_(profile == "standard")
    if profile == "moderate":
        for name, module in unet.named_modules():
            if name.endswith(CROSS_ATTENTION):
                module.requires_grad_(True)
    if profile == "lite":
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        options = {"lora_dropout": adapters.dropout, "init_lora_weights": adapters.init == "kaiming" or adapters.init}
        unet.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, **options))
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


class Trainer:
    """One fine-tuning of `pipe`'s UNet, in place; `step` takes what the script's loop takes from its data loader."""

    def __init__(
        self,
        pipe: Any,
        profile: str,
        *,
        warmup: int = WARMUP,
        dtype: str = "float32",
        adapters: Adapters = PAPER,
    ):
        self.pipe, self.device, self.dtype = pipe, pipe.device, getattr(torch, dtype)
        for frozen in (pipe.vae, pipe.text_encoder):  # in half precision where asked for, unlike the UNet's weights
            frozen.requires_grad_(False)
            if self.dtype != torch.float32:
                frozen.to(self.dtype)
        self.parameters = trainable(pipe.unet, profile, adapters)
        pipe.unet.train()
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=WEIGHT_DECAY, fused=True
        )
        self.rate = torch.optim.lr_scheduler.LambdaLR(
            self.optimiser, lambda step: min(1.0, step / warmup) if warmup else 1.0
        )
        self.noise_schedule = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)

    def step(self, pixels: torch.Tensor, ids: torch.Tensor) -> float:
        """pixels [B, 3, H, W] in [-1, 1], token ids [B, L]: encode both, then train on them. The loss."""
        return self.step_on_latents(*self.encode(pixels, ids))

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(scaled latents [B, C, h, w], text states [B, L, E])."""
        latents = self.pipe.vae.encode(pixels.to(self.dtype)).latent_dist.sample()
        return latents * self.pipe.vae.config.scaling_factor, self.pipe.text_encoder(ids)[0]

    def step_on_latents(self, latents: torch.Tensor, context: torch.Tensor) -> float:
        """The step after encoding: scaled latents [B, C, h, w], text states [B, L, E]. The loss."""
        schedule = self.noise_schedule
        noise = torch.randn_like(latents)
        t = torch.randint(0, schedule.config.num_train_timesteps, (len(latents),), device=self.device)
        is_epsilon = schedule.config.prediction_type == "epsilon"
        target = noise if is_epsilon else schedule.get_velocity(latents, noise, t)
        is_mixed = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype if is_mixed else None, enabled=is_mixed):
            output = self.pipe.unet(schedule.add_noise(latents, noise, t), t, context, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(output.float(), target.float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimiser.step()
        self.rate.step()
        self.optimiser.zero_grad()
        return loss.item()


def train(trainer: Trainer, images_u8: np.ndarray, captions: list[str], rows: Iterable[np.ndarray]) -> list[float]:
    """The script's loop over batches of rows; the losses. images_u8 [N, H, W, 3], already of the size to train at."""
    tokens = tokenize(trainer.pipe, captions)
    losses = []
    for batch in rows:
        losses.append(trainer.step(pixels(images_u8[batch], trainer.device), tokens[batch].to(trainer.device)))
    return losses


def tokenize(pipe: Any, captions: list[str]) -> torch.Tensor:
    length = pipe.tokenizer.model_max_length
    options: dict[str, Any] = {"padding": "max_length", "max_length": length, "truncation": True}
    return pipe.tokenizer(captions, return_tensors="pt", **options).input_ids


def pixels(images_u8: np.ndarray, device: Any) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(images_u8).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1
