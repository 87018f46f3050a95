"""The typed configuration of a run. Every field may be set on the command line: --config.bft.lr=2e-4.

A field whose default is `AS_PROTOCOL` has the value of the config's protocol unless it is set (`spqr_jax.protocols`).
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

AS_PROTOCOL: Any = None  # the value of the protocol that the config names
AS_FITS: Any = None  # chosen so that the program fits into the devices' memory; the value changes no result


@dataclass
class Subject:
    """A model under test: the backbone after a method made it safe, or a checkpoint that someone else made safe."""

    name: str
    method: str = "none"  # a name in spqr_jax.methods.METHODS, of a plug-in, or a dotted path of your own
    options: dict[str, Any] = field(default_factory=dict)  # the method's keyword arguments
    checkpoint: str = ""  # instead of a method: anything convert.load takes, with the backbone as base


@dataclass
class Attack:
    """An attack on every subject, before and after fine-tuning: what it makes of harmful prompts is drawn and judged.

    Its results stand in attacks.json and take no part in the score (docs/attacks.md).
    """

    name: str
    attack: str  # a name in spqr_jax.attacks.ATTACKS
    options: dict[str, Any] = field(default_factory=dict)  # the attack's keyword arguments: its budget
    transfer: bool = False  # made once on the unaligned model, and drawn by every subject
    prompts: int = 0  # harmful prompts that are attacked, the first ones of the run; 0: all


@dataclass
class Probe:
    """A further prompt set, drawn and judged on every subject before and after fine-tuning.

    Its results stand in probes.json and take no part in the score (docs/probes.md).
    """

    name: str
    prompts: str  # as in `Prompts`, or a set of the emoji world's own, "mini:lookalikes" (spqr_jax/mini/probes.py)
    role: str = "benign"  # "harmful": what should not be drawn; "benign": what should, and has a CLIPScore
    n: int = 100  # prompts drawn from the set


@dataclass
class Prompts:
    """Prompt sets: "mini:harmful", one of its categories ("mini:weapons"), "mini:benign", or a prompt file.

    A harmful set that the protocol knows has its kind before the file: "visu:FILE", "i2p:FILE", "rab:FILE". The
    protocol then says which rows are used, unless the name goes on with a selection: "visu:FILE?tag=violence".
    """

    harmful: str = "mini:harmful"
    benign: str = "mini:benign"
    n_harmful: int = AS_PROTOCOL  # prompts drawn from the set
    n_benign: int = AS_PROTOCOL
    own_guidance: bool = AS_PROTOCOL  # use the guidance that a prompt file gives for a prompt
    images: int = 1  # images for each prompt


@dataclass
class Generation:
    """Sampling. The paper has the default scheduler (PNDM), 50 steps, guidance 7.5, and 512x512 pixels."""

    steps: int = AS_PROTOCOL
    guidance: float = AS_PROTOCOL
    scheduler: str = "pndm"
    negative: str = ""
    height: int = 0  # pixels; 0: the backbone's own size
    width: int = 0
    max_sequence_length: int = 0  # tokens of a text for T5, of SD3 and FLUX; 0: the backbone's usual number
    noise: str = "jax"  # or "torch": the noise of PyTorch's CPU generator
    batch_size: int = 0  # over all devices; 0: as many as fit, up to the size beyond which no time is saved


@dataclass
class PerProfile:
    """One whole number for each profile."""

    lite: int = 0
    moderate: int = 0
    standard: int = 0


@dataclass
class OwnSteps:
    """One whole number for each profile beyond the protocols'."""

    dora: int = 0
    lora_text: int = 0
    dreambooth: int = 0
    textual_inversion: int = 0


@dataclass
class OwnEpochs:
    """The same for those that pass over the whole data set of a scenario."""

    dora: int = 0
    lora_text: int = 0


@dataclass
class OwnRates:
    """A learning rate for each profile beyond the protocols'."""

    dora: float = 0.0
    lora_text: float = 0.0
    dreambooth: float = 0.0
    textual_inversion: float = 0.0


@dataclass
class Own:
    """Adaptations beyond the protocols' profiles (docs/adaptations.md). No protocol says how long they train."""

    steps: OwnSteps = field(default_factory=OwnSteps)  # above 0: instead of epochs; the last two need it
    epochs: OwnEpochs = field(default_factory=OwnEpochs)  # passes over every stage of the curriculum
    lr: OwnRates = field(default_factory=OwnRates)  # 0: that of all profiles, bft.lr
    adapters: dict[str, str] = field(default_factory=dict)  # NAME -> file, for the profile "adapter:NAME"
    pictures: str = ""  # a few pictures of one thing, a data source, for dreambooth and textual_inversion
    n_pictures: int = 5
    instance: str = ""  # what dreambooth captions them with: "a photo of sks dog"
    kind: str = ""  # what its class pictures are drawn with: "a photo of dog"
    class_pictures: int = 100
    prior_weight: float = 1.0  # of the class pictures in the loss
    word: str = "<new>"  # the new word of textual_inversion
    initial: str = ""  # the word of one token that it starts as: "dog"


@dataclass
class BFT:
    """Benign fine-tuning."""

    profiles: tuple[str, ...] = ("lite", "moderate", "standard")  # or those of `own`, or "adapter:FILE"
    scenarios: tuple[str, ...] = ("general",)
    data: dict[str, str] = field(default_factory=dict)  # scenario -> data set (docs/data.md); default "mini:<scenario>"
    resolution: int = 0  # pixels of the square images (paper: 512); 0: the backbone's own size
    crop: str = AS_PROTOCOL  # "center", or "random": another crop in each pass
    flip: bool = AS_PROTOCOL  # mirror half of the images
    max_bad: int = 10  # unreadable images and empty captions skipped before the run stops
    seeds: tuple[int, ...] = (42,)
    samples: int = AS_PROTOCOL
    curriculum: tuple[int, ...] = AS_PROTOCOL  # samples seen by the end of each stage
    stages: str = AS_PROTOCOL  # "increments": a stage trains the samples it adds; "nested": all samples so far
    order: str = AS_PROTOCOL  # "file": samples in the order of the data; "shuffled": another order in each pass
    steps: PerProfile = field(default_factory=PerProfile)  # 0: from the epochs over the curriculum
    epochs: PerProfile = field(default_factory=lambda: PerProfile(AS_PROTOCOL, AS_PROTOCOL, AS_PROTOCOL))
    batch_size: int = AS_PROTOCOL
    lr: float = AS_PROTOCOL
    warmup_steps: int = AS_PROTOCOL
    warmup_share: float = 0.0  # above 0: warm-up as a share of the steps, for runs with fewer steps than the paper's
    weight_decay: float = AS_PROTOCOL
    max_grad_norm: float = AS_PROTOCOL
    rank: int = AS_PROTOCOL
    alpha: float = AS_PROTOCOL
    lora_init: str = AS_PROTOCOL  # "gaussian" or "kaiming"
    dropout: float = AS_PROTOCOL
    text_encoder: bool = AS_PROTOCOL  # adapters on the text encoder too, under the profile lite
    joint_text: bool = False  # adapters on the text stream of joint attention too (SD3, FLUX), under lite
    snr_gamma: float = 0.0  # above 0: min-SNR weighting; this and the next two are off as published
    noise_offset: float = 0.0
    ema: float = 0.0
    accumulate: int = 0  # parts of a batch that are computed one after the other, for less memory; 0: as fits
    remat: bool = AS_FITS  # compute activations again in the backward pass, for less memory
    checkpoint_every: int = 500  # steps between saved states
    eval_at: tuple[int, ...] = ()  # steps at which harmfulness is measured, for a drift curve
    eval_prompts: int = 0  # harmful prompts used there; 0: all
    own: Own = field(default_factory=Own)


@dataclass
class Judges:
    """The judges. `safety` has names of your choice, each with a judge: "nudenet", "llavaguard:DIR", "q16:DIR",
    "mini:harm", or the path of an ONNX classifier with its sidecar. See docs/judges.md.

    The protocol says which variant "nudenet" and "llavaguard:DIR" stand for, unless the source says it itself:
    "nudenet:v2", "llavaguard:DIR?view=base".
    """

    safety: dict[str, str] = field(default_factory=lambda: {"harm": "mini:harm"})
    rule: str = AS_PROTOCOL  # joins the verdicts: "union", "all", "majority", or the name of one judge
    clip_score: str = "mini:clip"
    features: str = "mini:features"
    reference: str = "mini:reference"  # real images that generated benign images are compared with
    n_reference: int = AS_PROTOCOL
    reference_crop: str = AS_PROTOCOL  # "whole", or "center": cropped to the shape of the generated images
    providers: str = "cpu"
    overlap: bool = True  # judge finished images while the next ones are generated
    max_undecided: float = 0.01  # share of undecided images above which a cell fails


@dataclass
class Score:
    """The score. Bounds of Q are pinned, or those of a cohort: the lowest and highest FID of some subjects."""

    fid_min: float = 0.0  # pinned bounds, if the two differ
    fid_max: float = 0.0
    cohort: tuple[str, ...] = ()  # names of the subjects whose FIDs bound Q; (): every method, without the control
    ceiling: str = ""  # CLIPScore that counts as P = 1: a number, a subject's name, or "none"; "": as the protocol
    eps: float = AS_PROTOCOL  # margin of Q (eq. 6)
    headline: str = (
        AS_PROTOCOL  # form of R in the ranking: "logistic" (eq. 3), or "exponential" (the published tables')
    )
    weights: tuple[float, float, float, float] = AS_PROTOCOL  # of S, P, Q and R in the harmonic mean
    replicates: int = 2000


@dataclass
class Report:
    """Parts of the report by name; empty: every part. Names: spqr_jax.report.tables.TABLES, .figures.FIGURES."""

    tables: tuple[str, ...] = ()  # of 1, 2, 3, 4, 5, D, E, kept, audit, drift, attacks, probes
    figures: tuple[str, ...] = ()  # of 2, 3, 4, drift, attacks
    prompts: int = 48  # in the gallery, at most
    blur: bool = True  # blur images of harmful prompts in the figure of examples (2); the page always blurs them


@dataclass
class Mesh:
    """The use of the devices. It changes no result. See docs/scale.md."""

    # Split weights and optimiser state over the devices, for models that do not fit whole. As fits: fine-tuning splits
    # them if nothing else fits, and sampling does not.
    fsdp: bool = AS_FITS
    cpu_devices: int = 1  # parts that a CPU is split into; small models run faster on several, but each has the weights


@dataclass
class Config:
    """One run. Its cells are all combinations of subjects, profiles, scenarios and seeds."""

    protocol: str = "spqr-jax"  # a name in spqr_jax.protocols.PROTOCOLS
    base: str = "mini"  # "mini", "mini:transformer", or anything convert.load takes
    dtype: str = "float32"
    concept: str = "mini"  # "mini", "mini:CATEGORY" or a preset of spqr_jax.concepts
    subjects: tuple[Subject, ...] = ()
    attacks: tuple[Attack, ...] = ()  # on every subject and cell; none of their results enters the score
    probes: tuple[Probe, ...] = ()  # the same
    prompts: Prompts = field(default_factory=Prompts)
    generation: Generation = field(default_factory=Generation)
    bft: BFT = field(default_factory=BFT)
    judges: Judges = field(default_factory=Judges)
    score: Score = field(default_factory=Score)
    report: Report = field(default_factory=Report)
    mesh: Mesh = field(default_factory=Mesh)
    seed: int = 0  # of prompt choice, alignment and image noise
    sources: dict[str, str] = field(default_factory=dict)  # path -> where to get it, for messages about missing files


def as_dict(config: Config) -> dict[str, Any]:
    """Plain values, as they go into the manifest: all fields but the sources, which are no settings.

    Attacks, probes and `bft.own` are there only where a config sets them: manifests of others are those of older runs.
    """
    values = dataclasses.asdict(config)
    del values["sources"]
    for name in ("attacks", "probes"):
        if not values[name]:
            del values[name]
    if config.bft.own == Own():
        del values["bft"]["own"]
    return values
