"""What the paper's experiments on Stable Diffusion share. Not an experiment: general.py and the others are.

Everything is looked for under the current directory, or under the one that SPQR_ASSETS names; models as diffusers
directories. SOURCES, below, says of each path where its content comes from. Nothing is downloaded. --dry_run shows all
files and packages that an experiment needs and that are not there yet, with their sources. Any of them may be
elsewhere: --config.base=..., --config.prompts.harmful=..., --config.bft.data.general=...,
--config.judges.safety.llavaguard=llavaguard:DIR and so on.
Look at fine-tuning images first: python -m spqr_jax.data check pictures/coco --judges nudenet=nudenet.

After a colon a config takes the subjects to run, default all eleven methods of the paper and the unaligned backbone:

    --config configs/general.py:none,uce,rece                       some of them, made safe here
    --config configs/general.py:none,esd=weights/esd-nudity.pt      a checkpoint that its authors released
    --config configs/general.py:none,Mine=weights/my-safe-model     your own, in any form that convert.load takes

Costs in the files are arithmetic, not measurements: at 512 x 512 an image takes 84.5 TFLOP (51 evaluations of the UNet
with guidance, 0.8 TFLOP each, and decoding), a step of standard fine-tuning with 16 samples 38.8 TFLOP; hours are at a
sustained 100 TFLOP/s. Aligning comes on top: seconds for UCE and RECE, up to some thousand small steps for the others.
"""

import os
from pathlib import Path

from spqr_jax import protocols
from spqr_jax.config import BFT, Config, Generation, Judges, Prompts, Subject

ASSETS = Path(os.environ.get("SPQR_ASSETS", ""))

BACKBONES = {
    "sd15": "weights/stable-diffusion-v1-5",
    "sd21": "weights/stable-diffusion-2-1",
    "sdxl": "weights/stable-diffusion-xl-base-1.0",
    "sd3": "weights/stable-diffusion-3-medium-diffusers",
    "sd35": "weights/stable-diffusion-3.5-medium",
    "flux": "weights/FLUX.1-dev",
}
# The one each backbone's own directory names: what diffusers takes unless told otherwise.
SCHEDULERS = {"sd15": "pndm", "sd21": "ddim", "sdxl": "euler"} | dict.fromkeys(("sd3", "sd35", "flux"), "flow_euler")
HARMFUL = {"visu": "prompts/visu.json", "i2p": "prompts/i2p.csv", "rab": "prompts/rab.csv"}
PROTOCOL = protocols.PROTOCOLS["eccv-2026"]
DATA = {  # scenario -> data set; a kind before the place
    "general": "coco:pictures/coco/annotations/captions_train2017.json",
    "multilingual_ar": "multilingual:pictures/multilingual.csv?language=ar&images=pictures/coco/train2017",
    "multilingual_es": "multilingual:pictures/multilingual.csv?language=es&images=pictures/coco/train2017",
    "multilingual_fr": "multilingual:pictures/multilingual.csv?language=fr&images=pictures/coco/train2017",
    "multilingual_hi": "multilingual:pictures/multilingual.csv?language=hi&images=pictures/coco/train2017",
    "artistic": "artistic:pictures/artistic",
    "medical": "chestxray:pictures/chest_xray + brainmri:pictures/brain_mri",
}
SOURCES = {  # path -> where its content comes from, its licence, and the command that exports a judge to {place}
    "weights/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5 on the hub, CreativeML OpenRAIL-M",
    "weights/stable-diffusion-2-1": "stabilityai/stable-diffusion-2-1 on the hub, or a mirror, OpenRAIL++-M",
    "weights/stable-diffusion-xl-base-1.0": "stabilityai/stable-diffusion-xl-base-1.0 on the hub, OpenRAIL++-M",
    "weights/stable-diffusion-3-medium-diffusers": "stabilityai/stable-diffusion-3-medium-diffusers on the hub, gated, "
    "Stability AI Community License",
    "weights/stable-diffusion-3.5-medium": "stabilityai/stable-diffusion-3.5-medium on the hub, gated, Stability AI "
    "Community License",
    "weights/FLUX.1-dev": "black-forest-labs/FLUX.1-dev on the hub, gated, FLUX.1 [dev] Non-Commercial License",
    "prompts/visu.json": "ViSU-Text_test.json of aimagelab/ViSU-Text, 5,000 rows; gated, non-commercial",
    "prompts/i2p.csv": "AIML-TUDA/i2p, 4,703 rows, MIT",
    "prompts/rab.csv": "Chia15/RingABell-Nudity, 285 rows, gated; or a file of chiayi-hsu/Ring-A-Bell, MIT",
    "pictures/coco/annotations": "annotations_trainval2017.zip of cocodataset.org, CC BY 4.0",
    "pictures/coco/train2017": "train2017.zip of cocodataset.org, under Flickr's terms",
    "pictures/coco/val2017": "val2017.zip of cocodataset.org, under Flickr's terms",
    "pictures/multilingual.csv": "no published file; configs/multilingual.py says what it holds and what is public",
    "pictures/artistic": "no published set; configs/domain.py says what it holds and which public set fits",
    "pictures/chest_xray": "NIH ChestX-ray14, nih-chest-xrays/data on Kaggle, tagged CC0",
    "pictures/brain_mri": "masoudnickparvar/brain-tumor-mri-dataset on Kaggle; its page states the terms",
    "judges/llavaguard": "AIML-TUDA/LlavaGuard-v1.2-0.5B-OV-hf, access form; "
    "python -m convert judges --kind llavaguard DOWNLOADED --out {place}; its policy file (docs/judges.md)",
    "judges/clip": "openai/clip-vit-base-patch32, MIT; python -m convert judges --kind clip DOWNLOADED --out {place}",
    "judges/inception": "pt_inception-2015-12-05-6726825d.pth of pytorch-fid, Apache-2.0; "
    "python -m convert judges --kind inception DOWNLOADED --out {place}",
}
LANGUAGES = tuple(scenario for scenario in DATA if scenario.startswith("multilingual_"))
DOMAINS = ("artistic", "medical")
# In the order of the paper's Table 1.
METHODS = {
    "erasediff": "EraseDiff",
    "fmn": "FMN",
    "advunlearn": "AdvUnlearn",
    "scissorhands": "Scissorhands",
    "stereo": "STEREO",
    "salun": "SalUn",
    "mace": "MACE",
    "esd": "ESD",
    "spm": "SPM",
    "uce": "UCE",
    "rece": "RECE",
}
CONTROL = Subject("No alignment", "none")


def at(place: str) -> str:
    """A place under the assets directory."""
    return (ASSETS / place).as_posix()


def subjects(chosen: str, default: tuple[str, ...] = ("none", *METHODS)) -> tuple[Subject, ...]:
    """Subjects from a comma-separated list of methods and NAME=CHECKPOINT; the default list for "".

    Raises ValueError for a method that is not one of the paper's.
    """
    return tuple(_subject(name.strip()) for name in (chosen.split(",") if chosen else default))


def _subject(text: str) -> Subject:
    name, is_checkpoint, place = text.partition("=")
    if is_checkpoint:
        return Subject(METHODS.get(name, name), checkpoint=place)
    if name == "none":
        return CONTROL
    if name not in METHODS:
        raise ValueError(f"subject {name!r} is unknown; expected none, {', '.join(METHODS)}, or NAME=CHECKPOINT.")
    return Subject(METHODS[name], name)


def variant(which: str, known: tuple[str, ...]) -> tuple[str, str]:
    """`VARIANT[:SUBJECTS]`, as it stands after a config's colon -> (variant, subjects); the first known one for "".

    Raises ValueError for an unknown variant.
    """
    name, _, chosen = which.partition(":")
    if (name or known[0]) not in known:
        raise ValueError(f"variant {name!r} is unknown; expected one of {', '.join(known)}, then :SUBJECTS if not all.")
    return name or known[0], chosen


def experiment(
    who: tuple[Subject, ...],
    *,
    backbone: str = "sd15",
    harmful: str = "visu",
    profiles: tuple[str, ...] = ("standard",),
    scenarios: tuple[str, ...] = ("general",),
) -> Config:
    """An experiment under the protocol of the second edition; --config.protocol=spqr-jax or arxiv-2511 takes another.

    The protocol says which prompts are drawn, how models are fine-tuned and judged, and how axes become a score
    (docs/protocol.md). What it leaves open is chosen here. Benign prompts: captions of COCO's validation split, whose
    images are also what quality is measured against; fine-tuning images come from the training split. Noise as
    PyTorch's CPU generator gives it, so that prompt files with seeds repeat published images.
    """
    return Config(
        protocol=PROTOCOL.name,
        base=at(BACKBONES[backbone]),
        dtype=PROTOCOL.dtype,
        concept=PROTOCOL.concept,
        subjects=who,
        prompts=Prompts(
            harmful=f"{harmful}:{at(HARMFUL[harmful])}", benign=at("pictures/coco/annotations/captions_val2017.json")
        ),
        generation=Generation(scheduler=SCHEDULERS[backbone], noise="torch"),
        bft=BFT(
            profiles=profiles,
            scenarios=scenarios,
            data={name: DATA[name].replace("pictures/", at("pictures") + "/") for name in scenarios},
        ),
        judges=Judges(
            safety={"nudenet": "nudenet", "llavaguard": "llavaguard:" + at("judges/llavaguard")},
            clip_score=at("judges/clip"),
            features=at("judges/inception/inception.onnx"),
            reference=at("pictures/coco/val2017"),
        ),
        seed=PROTOCOL.seed,
        sources={at(place): source.format(place=at(place)) for place, source in SOURCES.items()},
    )
