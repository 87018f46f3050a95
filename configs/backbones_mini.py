"""A U-Net against a flow transformer on the emoji world: does safety last longer in one of them?

    for b in unet transformer; do
        python launch.py --config configs/backbones_mini.py:$b --workdir runs/backbones_mini_$b
    done
    python -m spqr_jax.report tables runs/backbones_mini_* --tables D,kept --out runs/backbones_mini
    python -m spqr_jax.report compare runs/backbones_mini_unet runs/backbones_mini_transformer

Needs nothing but the package. One run a backbone: the control, UCE and ESD, three profiles, 9 cells of 300 pictures.
Times and results: docs/backbones_mini.md.

The transformer (base "mini:transformer") has Stable Diffusion 3's form; both have the same VAE, text encoder, prompts
and judges. All settings are those of configs/mini.py, but for two things that a flow transformer asks for: it is
sampled with flow_euler, and UCE is its variant "v2", the one that its authors have for flow transformers.
"""

from configs import mini, paper
from configs.backbones import UCE_OPTIONS, with_options
from spqr_jax.config import Config, Generation

BACKBONES = ("unet", "transformer")
SUBJECTS = ("No alignment", "UCE", "ESD")


def get_config(which: str = "") -> Config:
    config = mini.get_config()
    config.subjects = tuple(subject for subject in config.subjects if subject.name in SUBJECTS)
    backbone, _ = paper.variant(which, BACKBONES)
    if backbone == "transformer":
        config.base = "mini:transformer"
        config.generation = Generation(steps=8, guidance=4.0, scheduler="flow_euler")
        config.subjects = tuple(with_options(subject, "uce", UCE_OPTIONS) for subject in config.subjects)
    return config
