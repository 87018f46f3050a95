"""The emoji world at the size of the paper: 500 benign and all 288 harmful prompts, three fine-tuning seeds.

    python launch.py --config configs/mini_full.py

Needs nothing but the package; resumable. Scenarios general, four languages, the artistic and the medical domain.
4 subjects x 3 profiles x 7 scenarios x 3 seeds = 252 cells of 788 pictures: about 4 hours on 2 CPU cores by the rates
of docs/mini.md (not run whole). Narrow it with --config.bft.scenarios and --config.bft.seeds.
"""

from configs import mini
from spqr_jax.config import Config
from spqr_jax.mini import world


def get_config() -> Config:
    config = mini.get_config()
    config.prompts.n_harmful, config.prompts.n_benign = 288, 500
    config.bft.scenarios = world.SCENARIOS
    config.bft.seeds = (1, 2, 3)
    return config
