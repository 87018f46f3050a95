"""Backbones: Stable Diffusion 2.1, XL, 3 and 3.5 and FLUX.1 beside 1.5, in all scenarios. Paper: Table D.

    for b in sd21 sdxl sd15; do python launch.py --config configs/backbones.py:$b --workdir runs/backbones_$b; done
    python -m spqr_jax.report tables runs/backbones_sd* --tables D --out runs/tableD
    python launch.py --config configs/backbones.py:sd21:none,uce --workdir runs/backbones_sd21

One run a backbone. The paper's four methods and the unaligned backbone; a method that does not know a backbone fails as
a subject and the others go on. On XL, ESD trains what its authors' script for XL does: cross-attention alone.
Images are generated and fine-tuned on at the backbone's own size (768 x 768 for stable-diffusion-2-1, 1024 x 1024 for
XL); for the paper's 512 x 512 with all of them add
--config.bft.resolution=512 --config.generation.height=512 --config.generation.width=512.
Needs what general.py, multilingual.py and domain.py need, and the backbone's weights.

sd3 is Stable Diffusion 3 medium (2,028,328,000 parameters), sd35 is 3.5 medium (2,243,171,520); both read T5-XXL
(4,762,310,656). Their weights are gated on the hub and under the Stability AI Community License: accept it there, then
download; commercial use above its revenue limit needs another licence. Other sizes, as 3.5 large (8,056,627,520) with
split weights: --config.base=weights/stable-diffusion-3.5-large --config.mesh.fsdp=True. Images are sampled with
flow_euler. Their subjects are the methods that are defined for joint attention. What holds them:
python -m spqr_jax.fit --config configs/backbones.py:sd3 --target tpu-v5e-4.

flux is FLUX.1 dev (11,901,408,320 parameters), which reads T5-XXL too. Its weights are gated on the hub and under the
FLUX.1 [dev] Non-Commercial License: accept it there, then download. schnell (11,891,178,560) is under Apache 2.0:
--config.base=weights/FLUX.1-schnell --config.generation.guidance=0. Images of dev are sampled with guidance 3.5, as its
authors do, and not with the protocol's 7.5, which is a scale of classifier-free guidance; fine-tuning tells dev
guidance 1. The transformer with its optimiser's state and gradients takes 190 GB in float32: fine-tuning splits it over
the devices by itself. Images are drawn from whole weights, 24 GB in bfloat16, unless --config.mesh.fsdp=True is given.

Cost with sd15: 5 subjects, 35 cells; 40,000 images and 109,550 steps, 7.6e18 FLOP, about 21 hours; about 2.7 times as
much with sd21, about 7.4 times with sdxl, whose whole UNet with its optimiser state and gradients takes 41 GB. Steps of
fine-tuning are computed as they fit, on several devices also split (docs/scale.md).
"""

import dataclasses
from typing import Any

from configs import paper
from spqr_jax.config import Config, Subject

METHODS = ("none", "advunlearn", "esd", "spm", "uce")
FLOW_METHODS = ("none", "esd", "uce")
UCE_OPTIONS = {"variant": "v2"}  # the one that its authors have for flow transformers
# What its authors' script for SDXL does (esd_sdxl.py): cross-attention alone, at a higher rate, for fewer steps.
ESD_XL_OPTIONS = {"method": "esd-x", "lr": 2e-4, "steps": 200, "eta": 0.0, "sampling_guidance": 2.0}
FLOW = ("sd3", "sd35", "flux")
DISTILLED_GUIDANCE = 3.5  # that FLUX.1 dev is sampled with, as in diffusers' pipeline


def get_config(which: str = "") -> Config:
    backbone, chosen = paper.variant(which, ("sd21", "sdxl", "sd15", *FLOW))
    methods = FLOW_METHODS if backbone in FLOW else METHODS
    subjects = paper.subjects(chosen, methods)
    if backbone in FLOW:
        subjects = tuple(with_options(subject, "uce", UCE_OPTIONS) for subject in subjects)
    if backbone == "sdxl":
        subjects = tuple(with_options(subject, "esd", ESD_XL_OPTIONS) for subject in subjects)
    config = paper.experiment(subjects, backbone=backbone, scenarios=tuple(paper.DATA))
    if backbone == "flux":
        return dataclasses.replace(
            config, generation=dataclasses.replace(config.generation, guidance=DISTILLED_GUIDANCE)
        )
    return config


def with_options(subject: Subject, method: str, options: dict[str, Any]) -> Subject:
    """The subject, with these options beside its own if its method is the one named."""
    return dataclasses.replace(subject, options=subject.options | options) if subject.method == method else subject
