"""Benign fine-tuning as a config says it: its number of steps, and the options of `finetune.train`."""

from typing import Any

from spqr_jax import finetune, profiles, protocols
from spqr_jax.config import BFT, Config
from spqr_jax.finetune import Memory, Optimiser
from spqr_jax.training.objective import Objective


def length(bft: BFT, profile: str) -> tuple[int | None, int | None]:
    """(steps that the config gives or None, passes over every stage or None) of a profile.

    An adapter from a file takes no step. Raises ValueError for an unknown profile, and for one of ours whose length the
    config leaves open.
    """
    protocols.check_profile(profile)
    if protocols.adapter_of(profile):
        return 0, None
    if profile in protocols.PROFILES:
        return getattr(bft.steps, profile) or None, getattr(bft.epochs, profile)
    steps, epochs = getattr(bft.own.steps, profile), getattr(bft.own.epochs, profile, 0)
    if steps or epochs:
        return steps or None, epochs or None
    passes = f"config.bft.own.epochs.{profile}, passes over the curriculum (the paper's lite takes 1), or "
    raise ValueError(
        f"profile {profile!r} is none of the protocol's, which says nothing of its length; set "
        f"{'' if profile in profiles.OF_FEW_PICTURES else passes}config.bft.own.steps.{profile}, steps of "
        f"{bft.batch_size} images."
    )


def num_steps(bft: BFT, profile: str, samples: int) -> int:
    """Steps of a fine-tuning on so many samples, as the config says: given, or from its epochs and curriculum.

    Raises ValueError as `length`.
    """
    given, epochs = length(bft, profile)
    sizes = list(bft.curriculum) or [samples]
    return finetune.num_steps(profile, sizes, bft.batch_size, given, epochs, stages=bft.stages)


def training_options(config: Config, profile: str, steps: int) -> dict[str, Any]:
    """The options of `finetune.train` that come from a config, for `steps` steps under a profile."""
    bft = config.bft
    warmup = round(bft.warmup_share * steps) if bft.warmup_share else bft.warmup_steps
    rate = getattr(bft.own.lr, profile, 0.0) or bft.lr
    options = {
        "batch_size": bft.batch_size,
        "curriculum": tuple(bft.curriculum),
        "stages": bft.stages,
        "order": bft.order,
        "optimiser": Optimiser(
            lr=rate, warmup_steps=warmup, weight_decay=bft.weight_decay, max_grad_norm=bft.max_grad_norm
        ),
        "objective": Objective(snr_gamma=bft.snr_gamma or None, noise_offset=bft.noise_offset, ema=bft.ema),
        "memory": Memory(accumulate=bft.accumulate, remat=bft.remat),
        **adapter_options(bft, profile),
        "checkpoint_every": bft.checkpoint_every,
        "fsdp": config.mesh.fsdp,
    }
    if profile in profiles.OF_FEW_PICTURES:
        options |= {"curriculum": (), "stages": "nested", "order": "shuffled"}
    return options | ({"word": bft.own.word} if profile == "textual_inversion" else {})


def adapter_options(bft: BFT, profile: str) -> dict[str, Any]:
    """The options of what is attached before training. The text encoder is trained under the profile lite alone."""
    options = {
        "rank": bft.rank,
        "alpha": bft.alpha,
        "dropout": bft.dropout,
        "lora_init": bft.lora_init,
        "text_encoder": bft.text_encoder and profile == "lite",
        "joint_text": bft.joint_text and profile == "lite",
    }
    return options | ({"initial": bft.own.initial} if profile == "textual_inversion" else {})
