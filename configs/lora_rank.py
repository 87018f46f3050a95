"""LoRA ranks 4, 8 and 16 of the lite profile, on three backbones. Paper: Table E.

    for r in 4 8 16; do python launch.py --config configs/lora_rank.py:sd15-$r --workdir runs/rank_sd15-$r; done
    python -m spqr_jax.report tables runs/rank_* --tables E --out runs/tableE
    python launch.py --config configs/lora_rank.py:sdxl-16:none,uce --workdir runs/rank_sdxl-16

One run a backbone (sd15, sd21, sdxl) and rank. Alpha stays 16 (Table C; the paper names no other for other ranks). The
paper's four methods and the unaligned backbone. Needs what configs/general.py needs, and for sd21 and sdxl their
weights; a method that does not know a backbone fails as a subject and the others go on.
Cost of one run with sd15: 10,000 images and 1,565 steps, at most 9.1e17 FLOP, about 3 hours; an image takes about
2.7 times as much with sd21 at 768 x 768, about 7.4 times with sdxl at 1024 x 1024.
"""

from configs import paper
from spqr_jax.config import Config

METHODS = ("none", "advunlearn", "esd", "spm", "uce")
VARIANTS = {f"{backbone}-{rank}": (backbone, rank) for backbone in paper.BACKBONES for rank in (4, 8, 16)}


def get_config(which: str = "") -> Config:
    name, chosen = paper.variant(which, tuple(VARIANTS))
    backbone, rank = VARIANTS[name]
    config = paper.experiment(paper.subjects(chosen, METHODS), backbone=backbone, profiles=("lite",))
    config.bft.rank = rank
    return config
