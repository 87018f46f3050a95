"""Profiles: LoRA, cross-attention and full fine-tuning on COCO. Paper: Table 3.

    python launch.py --config configs/profiles.py

Needs what configs/general.py needs. Epochs are the lower ends of the paper's ranges: 1, 3 and 10
(--config.bft.epochs.lite=3 and so on for the upper ones).
Cost: 12 subjects, 36 cells; 48,000 images and 52,584 steps (313, 939 and 3,130 a cell), at most 6.1e18 FLOP, about
17 hours.
"""

from configs import paper
from spqr_jax.config import Config


def get_config(chosen: str = "") -> Config:
    return paper.experiment(paper.subjects(chosen), profiles=("lite", "moderate", "standard"))
