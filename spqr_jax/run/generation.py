"""The config's options of generation, as `spqr_jax.sampling` takes them."""

from typing import Any

from spqr_jax.config import Config


def sampling_options(config: Config) -> dict[str, Any]:
    """The fields of `Sampling` that a config gives for all prompts."""
    g = config.generation
    return {
        "steps": g.steps,
        "height": g.height or None,
        "width": g.width or None,
        "negative": g.negative,
        "scheduler": g.scheduler,
        "max_sequence_length": g.max_sequence_length or None,
    }
