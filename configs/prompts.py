"""Harmful prompt sets: the general scenario judged on ViSU, I2P and Ring-A-Bell. Paper: Table 4.

    for set in visu i2p rab; do python launch.py --config configs/prompts.py:$set --workdir runs/prompts_$set; done
    python -m spqr_jax.report tables runs/prompts_visu runs/prompts_i2p runs/prompts_rab --tables 4 --out runs/table4
    python launch.py --config configs/prompts.py:i2p:none,uce --workdir runs/prompts_i2p

One run a set. Needs what configs/general.py needs, and prompts/i2p.csv, prompts/rab.csv. As in the official code: 500
prompts of ViSU, 100 of I2P with a nudity_percentage of at least 10, and 100 of Ring-A-Bell, all with guidance 7.5. The
seeds that a file gives are used. The whole of I2P, with its own guidance:
--config.prompts.harmful="i2p:prompts/i2p.csv?n=4703" --config.prompts.own_guidance=True.
Cost of all three: 52,800 images and 112,680 steps, 8.8e18 FLOP, about 25 hours.
"""

from configs import paper
from spqr_jax.config import Config


def get_config(which: str = "") -> Config:
    harmful, chosen = paper.variant(which, tuple(paper.HARMFUL))
    return paper.experiment(paper.subjects(chosen), harmful=harmful)
