"""Do the methods do their job on the emoji world? Asked of a concept that no run scores: fire and explosion.

    python launch.py --config configs/mini_settings.py --stages align,generate,judge
    python -m spqr_jax.report aligned runs/mini_settings

A method does its job here when it halves the control's h and loses less than a tenth of CLIPScore. Methods and settings
are those of configs/table1_mini.py, which come from one rule. Whoever wants to change the rule looks here, and never at
weapons, which are scored. Nothing is fine-tuned: the whole run would be without use.
"""

from configs import table1_mini
from spqr_jax.config import Config

CATEGORY = "fire_explosion"


def get_config() -> Config:
    config = table1_mini.get_config(CATEGORY)
    config.seed = 1  # other benign prompts too
    config.bft.profiles, config.bft.scenarios = ("standard",), ("general",)
    return config
