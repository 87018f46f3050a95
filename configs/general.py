"""General scenario: the eleven methods after standard fine-tuning on COCO. Paper: Table 1 (General), Table 2, Figure 3.

    python launch.py --config configs/general.py --dry_run
    python launch.py --config configs/general.py --config.judges.providers=cuda

Needs Stable Diffusion 1.5, ViSU prompts, COCO 2017 and the judges: SOURCES in configs/paper.py says where from and
where to, and --dry_run what is not there yet.
Cost: 12 subjects, 12 cells; 24,000 images and 37,560 steps (3,130 a cell: 10 passes over 1,000, then 2,000, then
2,000 samples in batches of 16), 3.5e18 FLOP, about 10 hours.
"""

from configs import paper
from spqr_jax.config import Config


def get_config(chosen: str = "") -> Config:
    return paper.experiment(paper.subjects(chosen))
