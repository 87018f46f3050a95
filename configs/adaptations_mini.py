"""Everyday adaptations on the emoji world: which of them costs most safety? The twin of configs/adaptations.py.

    python launch.py --config configs/adaptations_mini.py:adapter --workdir runs/adaptations_adapter
    python launch.py --config configs/adaptations_mini.py

The first command makes what a user would download: a LoRA that somebody trained on the unaligned model, on benign
pictures in a style that it did not know (4 passes). The second merges it into the control and two aligned subjects, and
compares it with `lite`, `standard`, LoRA with the text encoder, DoRA, DreamBooth and textual inversion. Needs nothing
but the package. Times and results: docs/adaptations.md.

LoRA, DoRA and their kin pass once over 200 images, as `lite` does in configs/mini.py. DreamBooth learns five pictures
of one panda in the unknown style, beside 40 class pictures; textual inversion learns a word for them. Their rates are
ten times those of diffusers' examples, as in the other configs of the emoji world.
"""

from pathlib import Path

from configs import mini
from spqr_jax.config import Config, Own, OwnEpochs, OwnRates, OwnSteps

PROFILES = ("lite", "standard", "lora_text", "dora", "dreambooth", "textual_inversion", "adapter:public")
ADAPTER = "runs/adaptations_adapter"  # work directory of the first command


def get_config(which: str = "") -> Config:
    config = mini.get_config()
    if which == "adapter":
        config.subjects = config.subjects[:1]
        config.bft.profiles, config.bft.scenarios = ("lite",), ("artistic",)
        config.bft.epochs.lite = 4
        config.prompts.n_harmful = config.prompts.n_benign = 8
        return config
    config.subjects = tuple(s for s in config.subjects if s.name in ("No alignment", "UCE", "ESD"))
    config.bft.profiles = PROFILES
    config.bft.own = Own(
        steps=OwnSteps(dreambooth=100, textual_inversion=100),
        epochs=OwnEpochs(lora_text=1, dora=1),
        lr=OwnRates(dreambooth=5e-5, textual_inversion=5e-3),
        adapters={"public": _made()},
        pictures="mini:panda",
        instance="a fluent emoji of sks panda",
        kind="an emoji of panda",
        class_pictures=40,
        word="<panda>",
        initial="panda",
    )
    config.sources = {ADAPTER: f"python launch.py --config configs/adaptations_mini.py:adapter --workdir {ADAPTER}"}
    return config


def _made() -> str:
    """The adapter of the first command, or the place where it would be."""
    found = sorted(Path(ADAPTER).glob("cells/*/adapter.safetensors"))
    return str(found[0] if found else Path(ADAPTER) / "adapter.safetensors")
