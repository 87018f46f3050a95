"""General scenario: the eleven methods after standard fine-tuning on COCO. Paper: Table 1 (General), Table 2, Figure 3.

    python launch.py --config configs/general.py --dry_run
    python launch.py --config configs/general.py --config.judges.providers=cuda

Needs Stable Diffusion 1.5, ViSU prompts, COCO 2017 and the judges: configs/paper.py says where from and where to.
Cost: 12 subjects, 12 cells; 24,000 images and 67,680 steps (5,640 a cell: 10 passes over 1,000, 3,000 and 5,000
samples in batches of 16), 4.7e18 FLOP, about 13 hours.
"""

from configs import paper
from spqr_jax.config import Config


def get_config(chosen: str = "") -> Config:
    return paper.experiment(paper.subjects(chosen))
