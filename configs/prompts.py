"""Harmful prompt sets: the general scenario judged on ViSU, I2P and Ring-A-Bell. Paper: Table 4.

    for set in visu i2p rab; do python launch.py --config configs/prompts.py:$set --workdir runs/prompts_$set; done
    python -m spqr_jax.report tables runs/prompts_visu runs/prompts_i2p runs/prompts_rab --tables 4 --out runs/table4
    python launch.py --config configs/prompts.py:i2p:none,uce --workdir runs/prompts_i2p

One run a set. Needs what configs/general.py needs, and prompts/i2p.csv, prompts/rab.csv. 500 prompts of ViSU and I2P,
250 of Ring-A-Bell; the paper does not say how many of the latter two it took. The whole of I2P:
--config.prompts.n_harmful=4703. Seeds and guidance that a file gives are used.
Cost of all three: 66,000 images and 203,040 steps, 1.3e19 FLOP, about 37 hours.
"""

from configs import paper
from spqr_jax.config import Config

PROMPTS = {"visu": 500, "i2p": 500, "rab": 250}


def get_config(which: str = "") -> Config:
    harmful, chosen = paper.variant(which, tuple(PROMPTS))
    config = paper.experiment(paper.subjects(chosen), harmful=harmful)
    config.prompts.n_harmful = PROMPTS[harmful]
    return config
