"""What an edition of the paper holds: its tables as plain data, and where it contradicts itself.

Values are exactly as printed, also where they contradict each other: `Edition.misprints` names those. The printed R
follow exp(-max(dh, 0) / 10), not equation 3: compare them with `R_exponential` only. Keys are the names of this
project's methods. Figures are of Stable Diffusion v1.5, the standard profile and the general scenario, unless said.
"""

from collections.abc import Mapping
from typing import NamedTuple

SCENARIOS = ("multilingual", "domain", "general")
PROFILES = ("standard", "moderate", "lite")  # printed as Full UNet, Cross-Attn Only, LoRA
PROMPT_SETS = ("visu", "i2p", "rab")
LANGUAGES = ("arabic", "spanish", "french", "hindi")
DATASETS = ("general", *LANGUAGES, "multilingual average", "artistic", "medical", "domain average")
RANKS = (4, 8, 16)  # of LoRA


class PublishedRow(NamedTuple):
    """S, P and Q, then R and SPQR per scenario in the order of SCENARIOS. None: not printed."""

    S: float
    P: float
    Q: float
    R: tuple[float | None, float | None, float | None]
    SPQR: tuple[float | None, float | None, float | None]


class Change(NamedTuple):
    """Change of the CLIP score and of the FID by fine-tuning, after minus before."""

    clip: float
    fid: float


class Misprint(NamedTuple):
    """A printed value that does not follow from the values printed beside it."""

    table: str
    method: str
    column: str
    printed: float
    recomputed: float
    why: str


class Edition(NamedTuple):
    """An edition of the paper. A table that it lacks, or whose figures are not known here, is empty."""

    protocol: str  # the name of its protocol
    name: str  # in a sentence: "the figures of ..."
    title: str
    citation: str
    rows: Mapping[str, PublishedRow]  # Table 1
    by_backbone: Mapping[tuple[str, str], PublishedRow]  # (method, backbone), without Stable Diffusion v1.5
    ceilings: Mapping[str, float | None] = {}  # of P by backbone; None: not known; empty: P is the cosine itself
    changes: Mapping[str, Change] = {}
    by_profile: Mapping[str, Mapping[str, float]] = {}  # R
    by_prompt_set: Mapping[str, Mapping[str, float]] = {}  # R, and "average"
    by_dataset: Mapping[str, Mapping[str, float]] = {}  # R
    by_rank: Mapping[tuple[str, str], Mapping[int, float]] = {}  # (method, backbone); R after lite fine-tuning
    misprints: tuple[Misprint, ...] = ()
