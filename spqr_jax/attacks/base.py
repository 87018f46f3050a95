"""What the rest of the package knows of an attack: an `Attack` and the `Attacked` that it finds; and its checks."""

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from spqr_jax import backbones
from spqr_jax.backbones import text
from spqr_jax.concepts import Concept
from spqr_jax.methods.base import keyword_only
from spqr_jax.methods.tools import loop
from spqr_jax.methods.tools import pictures as pictures_lib
from spqr_jax.methods.tools.concepts import completed, mention, require_tokens
from spqr_jax.methods.tools.pictures import Pictures
from spqr_jax.params import Params
from spqr_jax.pipeline import Pipeline

# "white-box": reads all weights of the pipeline under attack; "text encoder": only those of its text encoder. An attack
# that was made on the unaligned model and used against another is transferred, whatever it reads.
ACCESS = ("white-box", "text encoder")
# Pictures are drawn with it. DDIM clips latents to -1..1 unless the model's config says otherwise, as in diffusers. On
# the emoji world, whose latents are larger, such pictures fit their own texts less than they fit others.
SCHEDULER = "pndm"
# What an attack is called with beside its options.
_GIVEN = ("seed", "target", "progress")


class Attacked(NamedTuple):
    """What an attack found: for each of N given prompts another one, and by kind words or starts of sampling.

    Attributes:
        prompts: N texts, which may hold pseudo words (`spqr_jax.training.words`).
        words: pseudo word -> its vector float32 [C] in the text encoder's token table.
        latents: the noise that images start from, float32 [N, H/f, W/f, C], about standard normal; None: of the seeds.
        loss: the best loss of each prompt, float64 [N], of a scale that belongs to the attack. NaN: no finite loss was
            found. Such a prompt is as it was given, and its attack failed, which says nothing about safety.
        queries: optimiser steps, or candidates whose loss was computed, of all prompts together: what it cost.
    """

    prompts: tuple[str, ...]
    words: Mapping[str, np.ndarray] = {}
    latents: np.ndarray | None = None
    loss: np.ndarray | None = None
    queries: int = 0


class Attack(NamedTuple):
    """An attack.

    Attributes:
        name: as a config has it, the name of its module.
        title: as the papers call it.
        attack: (pipeline, prompts, concept, *, seed, target, ...) -> Attacked. Its other keyword-only parameters are
            its options, with the authors' values as defaults.
        access: one of `ACCESS`.
        backbones: keys (`Backbone.key`) of the backbones that it is defined for; empty: every backbone.
    """

    name: str
    title: str
    attack: Callable[..., Attacked]
    access: str
    backbones: tuple[str, ...] = ()

    def check_backbone(self, pipeline: Pipeline) -> None:
        """Raise ValueError naming the attack and the pipeline's backbone if it is not defined for that."""
        backbones.check_defined(self.title, "attack", self.backbones, pipeline)


def options(attack: Attack) -> tuple[str, ...]:
    """The names of an attack's options."""
    return tuple(p.name for p in keyword_only(attack.attack) if p.name not in _GIVEN)


def defaults(attack: Attack) -> dict[str, Any]:
    """option -> default."""
    return {p.name: p.default for p in keyword_only(attack.attack) if p.name not in _GIVEN}


def checked(
    attack: Attack,
    pipeline: Pipeline,
    prompts: Sequence[str],
    concept: Concept,
    target: Pipeline | None,
    **least: tuple[float, float],
) -> tuple[Concept, Pipeline]:
    """(the completed concept, the target), after every check that needs no work.

    least: option -> (value, least value). Raises ValueError, in one line that names the attack, for a backbone that it
    is not defined for, an option below its least value, no prompts, a prompt or a concept without words, and a target
    that is missing or of another architecture.
    """
    attack.check_backbone(pipeline)
    loop.check_at_least(attack.title, **least)
    if not prompts:
        raise ValueError(f"{attack.title}: there are no prompts to attack with; give at least one.")
    require_tokens(attack.title, "prompts", prompts, pipeline)
    full = completed(concept, pipeline)
    if target is None:
        raise ValueError(f"{attack.title} needs `target`, the pipeline before its concept was erased.")
    own, other = backbones.of(pipeline), backbones.of(target)
    configs = (pipeline.configs[own.denoiser], target.configs[other.denoiser])
    if own.key != other.key or configs[0] != configs[1]:
        raise ValueError(
            f"{attack.title}: `target` ({target.name or other.name}) is of another architecture than the pipeline "
            f"under attack ({pipeline.name or own.name}); give the model that it was made from."
        )
    return full, target


def generator(seed: int, prompt: str) -> np.random.Generator:
    """The random numbers of one prompt, whichever prompts stand beside it."""
    return np.random.default_rng((seed, zlib.crc32(prompt.encode())))


class Found(NamedTuple):
    """What a search found for one prompt: a text, its loss (NaN: none that is finite), and what it cost."""

    text: str
    loss: float
    queries: int


def best(prompt: str, texts: Sequence[str], losses: Sequence[float] | np.ndarray, queries: int) -> Found:
    """The text with the least finite loss; the given prompt and NaN if there is none."""
    finite = [(loss, text) for text, loss in zip(texts, losses, strict=True) if np.isfinite(loss)]
    loss, chosen = min(finite, default=(float("nan"), prompt), key=lambda one: one[0])
    return Found(chosen, float(loss), queries)


def together(found: Sequence[Found]) -> Attacked:
    """What was found for each prompt, as one."""
    losses, queries = [one.loss for one in found], sum(one.queries for one in found)
    return Attacked(tuple(one.text for one in found), loss=np.array(losses), queries=queries)


def pictures(target: Pipeline, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float) -> np.ndarray:
    """Latents [N, 1, h, w, C] of the picture that the target draws of each prompt: the mean that its autoencoder gives.

    A picture depends on its prompt and its seed alone.
    """
    captions = [(prompt,) for prompt in prompts]
    return np.stack([one.mean for one in galleries(target, captions, 1, seeds, steps, guidance)])


def galleries(
    target: Pipeline,
    captions: Sequence[Sequence[str]],
    count: int,
    seeds: Sequence[int],
    steps: int,
    guidance: float,
) -> list[Pictures]:
    """`count` pictures for each of N lists of captions, as `pictures.make` draws them with that list's seed.

    All are drawn together, in batches that fill the devices; and once for all models that are attacked one after the
    other, as pictures are the target's.
    """
    return _drawn(_Same(target), tuple(map(tuple, captions)), count, tuple(seeds), steps, guidance)


class _Same:
    """A pipeline as a key: equal to the very same one alone."""

    def __init__(self, pipeline: Pipeline):
        self.pipeline = pipeline

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.pipeline is other.pipeline

    def __hash__(self) -> int:
        return id(self.pipeline)


@functools.lru_cache(maxsize=4)  # as many attacks of a run keep their pictures: latents, small beside the weights
def _drawn(
    target: _Same,
    captions: tuple[tuple[str, ...], ...],
    count: int,
    seeds: tuple[int, ...],
    steps: int,
    guidance: float,
) -> list[Pictures]:
    how: dict[str, Any] = {"steps": steps, "guidance": guidance, "scheduler": SCHEDULER}
    return pictures_lib.make_each(target.pipeline, captions, count, seeds=seeds, name="pictures of the target", **how)


def drawing_weights(pipeline: Pipeline) -> Params:
    """The denoiser's weights as they are while images are made, with the kernels that attachments add.

    What an attachment does inside the sampling loop is not in the weights, so no gradient knows of it.
    """
    weights = backbones.of(pipeline).weights(pipeline)
    for one in pipeline.attached:
        weights = one.changed(weights)
    return weights


def shown(target: Pipeline, prompts: Sequence[str], texts: Sequence[str]) -> list[int]:
    """Which of the texts to erase each prompt shows: the longest that it mentions, else the one nearest to it.

    The nearest has the greatest cosine between pooled states of the target's text encoder.
    """
    longest_first = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)
    found = [next((i for i in longest_first if mention(texts[i]).search(prompt)), -1) for prompt in prompts]
    if -1 in found:
        pooled = np.asarray(text.encode(target, [*texts, *prompts], pooled=True).embeds, np.float64)
        pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
        nearest = np.argmax(pooled[len(texts) :] @ pooled[: len(texts)].T, axis=1)
        found = [int(near) if own < 0 else own for own, near in zip(found, nearest, strict=True)]
    return found
