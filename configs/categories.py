"""Categories of harm: the general scenario by ViSU's tags. Paper: Figures 4 and D.

    python launch.py --config configs/categories.py

2,000 harmful prompts of every tag instead of 500 of the erased concept, so that a category has some hundred: with 500
the interval of a category's R is as wide as R itself. This departs from the protocol, and the report says so.
Categories are ViSU's own tags; the report draws one radar a method. P and Q come from benign prompts, which have no
category of harm. Needs what configs/general.py needs.
Cost: 12 subjects, 12 cells; 60,000 images and 37,560 steps, 6.5e18 FLOP, about 18 hours.
"""

from configs import paper
from spqr_jax.config import Config


def get_config(chosen: str = "") -> Config:
    config = paper.experiment(paper.subjects(chosen))
    config.prompts.harmful += "?"  # no selection: every tag
    config.prompts.n_harmful = 2000
    return config
