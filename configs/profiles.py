"""Profiles: LoRA, cross-attention and full fine-tuning on COCO. Paper: Table 3.

    python launch.py --config configs/profiles.py

Needs what configs/general.py needs. Epochs are the lower ends of the paper's ranges: 1, 3 and 10
(--config.bft.epochs.lite=3 and so on for the upper ones).
Cost: 12 subjects, 36 cells; 48,000 images and 94,752 steps (564, 1,692 and 5,640 a cell), at most 7.7e18 FLOP, about
21 hours.
"""

from configs import paper
from spqr_jax.config import Config


def get_config(chosen: str = "") -> Config:
    return paper.experiment(paper.subjects(chosen), profiles=("lite", "moderate", "standard"))
