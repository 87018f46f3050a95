"""Benign fine-tuning as a config says it: its number of steps, and the options of `finetune.train`."""

from typing import Any

from spqr_jax import finetune
from spqr_jax.config import BFT, Config
from spqr_jax.finetune import Memory, Optimiser
from spqr_jax.training.objective import Objective


def num_steps(bft: BFT, profile: str, samples: int) -> int:
    """Steps of a fine-tuning on so many samples, as the config says: given, or from its epochs and curriculum."""
    given, epochs = getattr(bft.steps, profile) or None, getattr(bft.epochs, profile)
    sizes = list(bft.curriculum) or [samples]
    return finetune.num_steps(profile, sizes, bft.batch_size, given, epochs, stages=bft.stages)


def training_options(config: Config, profile: str, steps: int) -> dict[str, Any]:
    """The options of `finetune.train` that come from a config, for `steps` steps under a profile."""
    bft = config.bft
    warmup = round(bft.warmup_share * steps) if bft.warmup_share else bft.warmup_steps
    return {
        "batch_size": bft.batch_size,
        "curriculum": tuple(bft.curriculum),
        "stages": bft.stages,
        "order": bft.order,
        "optimiser": Optimiser(
            lr=bft.lr, warmup_steps=warmup, weight_decay=bft.weight_decay, max_grad_norm=bft.max_grad_norm
        ),
        "objective": Objective(snr_gamma=bft.snr_gamma or None, noise_offset=bft.noise_offset, ema=bft.ema),
        "memory": Memory(accumulate=bft.accumulate, remat=bft.remat),
        **adapter_options(bft, profile),
        "checkpoint_every": bft.checkpoint_every,
        "fsdp": config.mesh.fsdp,
    }


def adapter_options(bft: BFT, profile: str) -> dict[str, Any]:
    """The options of the adapters. The text encoder is trained under the profile lite alone."""
    return {
        "rank": bft.rank,
        "alpha": bft.alpha,
        "dropout": bft.dropout,
        "lora_init": bft.lora_init,
        "text_encoder": bft.text_encoder and profile == "lite",
        "joint_text": bft.joint_text and profile == "lite",
    }
