"""The typed configuration of a run. Every field may be set on the command line: --config.bft.lr=2e-4."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Subject:
    """A model under test: the backbone after a method made it safe, or a checkpoint that someone else made safe."""

    name: str
    method: str = "none"  # a name in spqr_jax.methods.METHODS, or the dotted path of a function of your own
    options: dict[str, Any] = field(default_factory=dict)  # the method's keyword arguments
    checkpoint: str = ""  # instead of a method: anything convert.load takes, with the backbone as base


@dataclass
class Prompts:
    """Prompt sets: "mini:harmful", "mini:benign", or a prompt file."""

    harmful: str = "mini:harmful"
    benign: str = "mini:benign"
    n_harmful: int = 500  # prompts drawn from the set (paper: 500 ViSU prompts)
    n_benign: int = 500
    images: int = 1  # images for each prompt


@dataclass
class Generation:
    """Sampling. The paper has the default scheduler (PNDM), 50 steps, guidance 7.5, and 512x512 pixels."""

    steps: int = 50
    guidance: float = 7.5
    scheduler: str = "pndm"
    negative: str = ""
    height: int = 0  # pixels; 0: the backbone's own size
    width: int = 0
    noise: str = "jax"  # or "torch": the noise of PyTorch's CPU generator
    batch_size: int = 0  # over all devices; 0: as many as fit, up to the size beyond which no time is saved


@dataclass
class PerProfile:
    """One whole number for each profile."""

    lite: int = 0
    moderate: int = 0
    standard: int = 0


@dataclass
class BFT:
    """Benign fine-tuning; defaults are the paper's Tables B and C and section 4.1."""

    profiles: tuple[str, ...] = ("lite", "moderate", "standard")
    scenarios: tuple[str, ...] = ("general",)
    data: dict[str, str] = field(default_factory=dict)  # scenario -> data set (docs/data.md); default "mini:<scenario>"
    resolution: int = 0  # pixels of the square images (paper: 512); 0: the backbone's own size
    crop: str = "center"  # or "random"
    flip: bool = False  # mirror half of the images
    max_bad: int = 10  # unreadable images and empty captions skipped before the run stops
    seeds: tuple[int, ...] = (42,)
    samples: int = 5000
    curriculum: tuple[int, ...] = (1000, 3000, 5000)
    steps: PerProfile = field(default_factory=PerProfile)  # 0: from the epochs over the curriculum
    epochs: PerProfile = field(default_factory=lambda: PerProfile(1, 3, 10))  # paper: 1-3, 3-8, 10-20
    batch_size: int = 16
    lr: float = 1e-4
    warmup_steps: int = 500
    warmup_share: float = 0.0  # above 0: warm-up as a share of the steps, for runs with fewer steps than the paper's
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.1
    snr_gamma: float = 0.0  # above 0: min-SNR weighting; this and the next two are off as published
    noise_offset: float = 0.0
    ema: float = 0.0
    accumulate: int = 1  # parts of a batch that are computed one after the other, for less memory
    remat: bool = False  # compute activations again in the backward pass, for less memory
    checkpoint_every: int = 500  # steps between saved states
    eval_at: tuple[int, ...] = ()  # steps at which harmfulness is measured, for a drift curve
    eval_prompts: int = 0  # harmful prompts used there; 0: all


@dataclass
class Judges:
    """The judges. `safety` has names of your choice, each with a judge: "nudenet", "llavaguard:DIR", "q16:DIR",
    "mini:harm", or the path of an ONNX classifier with its sidecar. See docs/judges.md."""

    safety: dict[str, str] = field(default_factory=lambda: {"harm": "mini:harm"})
    rule: str = "union"
    clip_score: str = "mini:clip"
    features: str = "mini:features"
    reference: str = "mini:reference"  # real images that generated benign images are compared with
    n_reference: int = 2048
    providers: str = "cpu"
    overlap: bool = True  # judge finished images while the next ones are generated
    max_undecided: float = 0.01  # share of undecided images above which a cell fails


@dataclass
class Score:
    """Bounds of the quality score. If the two are equal, the lowest and highest FID of this run's subjects are used."""

    fid_min: float = 0.0
    fid_max: float = 0.0
    replicates: int = 2000


@dataclass
class Report:
    """Parts of the report by name; empty: every part. Names: spqr_jax.report.tables.TABLES, .figures.FIGURES."""

    tables: tuple[str, ...] = ()  # of 1, 2, 3, 4, 5, D, E, audit, drift
    figures: tuple[str, ...] = ()  # of 2, 3, 4, drift
    prompts: int = 48  # in the gallery, at most
    blur: bool = True  # blur images of harmful prompts in the figure of examples (2); the page always blurs them


@dataclass
class Mesh:
    """The use of the devices. It changes no result. See docs/scale.md."""

    fsdp: bool = False  # split weights and optimiser state over the devices, for models that do not fit whole
    cpu_devices: int = 1  # parts that a CPU is split into; small models run faster on several, but each has the weights


@dataclass
class Config:
    """One run. Its cells are all combinations of subjects, profiles, scenarios and seeds."""

    base: str = "mini"  # "mini", or anything convert.load takes
    dtype: str = "float32"
    concept: str = "mini"  # "mini", "mini:CATEGORY" or a preset of spqr_jax.concepts
    subjects: tuple[Subject, ...] = ()
    prompts: Prompts = field(default_factory=Prompts)
    generation: Generation = field(default_factory=Generation)
    bft: BFT = field(default_factory=BFT)
    judges: Judges = field(default_factory=Judges)
    score: Score = field(default_factory=Score)
    report: Report = field(default_factory=Report)
    mesh: Mesh = field(default_factory=Mesh)
    seed: int = 0  # of prompt choice, alignment and image noise


def as_dict(config: Config) -> dict[str, Any]:
    """Plain values, as they go into the manifest."""
    return dataclasses.asdict(config)
