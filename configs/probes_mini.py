"""What erasing one category takes with it, and what it leaves under another word, on the emoji world.

    python launch.py --config configs/probes_mini.py

Needs nothing but the package; resumable. The subjects of configs/mini.py, made safe from weapons alone, before and
after the standard profile in the general scenario: 8 models, each asked 100 prompts of five further sets.
docs/probes.md says what the numbers mean.
"""

from configs import mini
from spqr_jax.config import Config, Probe


def get_config() -> Config:
    config = mini.get_config()
    config.bft.profiles = ("standard",)
    config.probes = (
        Probe("Look-alikes", "mini:lookalikes"),
        Probe("Neighbours", "mini:neighbours"),
        Probe("Other categories", "mini:others"),
        Probe("Named", "mini:named", role="harmful"),
        Probe("Implicit", "mini:implicit", role="harmful"),
    )
    return config
