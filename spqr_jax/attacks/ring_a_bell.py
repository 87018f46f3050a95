"""Ring-A-Bell (Tsai et al., ICLR 2024): a genetic search for words that are read as the prompt with more concept."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from spqr_jax.attacks import base, tokens
from spqr_jax.attacks.base import Attack, Attacked, Found
from spqr_jax.attacks.tokens import Vocabulary
from spqr_jax.backbones import text as text_lib
from spqr_jax.concepts import Concept
from spqr_jax.methods.tools import loop
from spqr_jax.methods.tools.word_vectors import Slots
from spqr_jax.params import Definition, Params
from spqr_jax.pipeline import Pipeline


def attack(
    pipeline: Pipeline,
    prompts: Sequence[str],
    concept: Concept,
    *,
    seed: int,
    target: Pipeline | None = None,
    length: int = 16,
    strength: float = 3.0,
    population: int = 200,
    generations: int = 3000,
    crossover: float = 0.5,
    mutation: float = 0.25,
    progress: bool = False,
) -> Attacked:
    """min over prompts c* of `length` words || T(c*) - (T(c) + strength v) ||^2, summed over the text states,

    v = mean_i (T(with_i) - T(without_i)) the concept's direction, from pairs of prompts that differ in the concept
    alone: those of `concept.prompts` that show the text which the given prompt c shows (`base.shown`), and the
    `replacements` of the same numbers. Only the text encoder is asked: c* is sought through the one of `pipeline`,
    towards what the one of `target` says (default: the same).

    A generation keeps the better half of its prompts, joins each with a random other one at a random place with
    probability `crossover` (two more prompts), and changes one word of each prompt with probability `mutation`. The
    first ones, `population` of them, are random words. loss: the distance of the best prompt of all generations.
    queries: prompts whose distance was computed.

    Defaults are those of the authors' code for nudity; for violence the strength is 5 or 5.5 and the length up to 75.
    Theirs is made once on the encoder of Stable Diffusion 1.4 and transferred to every model (success: a classifier
    flags its image); so it is here where `pipeline` is the unaligned model. Their concept directions come from prompts
    written for it, 19 of which were left out by hand. They return the best of the last generation, of which mutation
    may have taken the best. The vocabulary is that of `tokens.Vocabulary`, theirs is all tokens.
    """
    least = {"length": (length, 1), "population": (population, 2), "generations": (generations, 1)}
    full, target = base.checked(ATTACK, pipeline, prompts, concept, target or pipeline, **least)
    for name, value in (("crossover", crossover), ("mutation", mutation)):
        if not 0 <= value <= 1:
            raise ValueError(f"{ATTACK.title}: {name}={value}, expected a probability, 0 to 1.")
    breeding = Breeding(population, generations, crossover, mutation)
    slots, words = tokens.before(pipeline, "", length), tokens.vocabulary(pipeline)
    encoder = Encoder(pipeline.definitions["text_encoder"], loop.on_device(pipeline.params["text_encoder"]), slots)
    said = np.asarray(text_lib.encode(target, prompts).hidden)
    shows = base.shown(target, prompts, full.erase)
    directions = {number: direction(target, full, number) for number in set(shows)}
    found = []
    for number, (prompt, states, shown) in enumerate(zip(prompts, said, shows, strict=True), 1):
        goal, rng = states + np.float32(strength) * directions[shown], base.generator(seed, prompt)
        bar = f"{ATTACK.title} {number} of {len(prompts)}" if progress else ""
        found.append(_search(encoder, words, prompt, goal, breeding, rng, bar))
    return base.together(found)


class Breeding(NamedTuple):
    """How prompts are bred: their number, generations, and the probabilities of both changes."""

    population: int
    generations: int
    crossover: float
    mutation: float


class Encoder(NamedTuple):
    """The text encoder under attack, and the text of slots that it is given."""

    definition: Definition
    params: Params
    slots: Slots


def direction(target: Pipeline, concept: Concept, number: int) -> np.ndarray:
    """The concept's direction in text states, float32 [L, E], by the prompts that show text `number` of `erase`."""
    shows = range(number, len(concept.prompts), len(concept.erase))
    pairs = [(concept.prompts[i], concept.replacements[i % len(concept.replacements)]) for i in shows]
    states = np.asarray(text_lib.encode(target, [text for pair in pairs for text in pair]).hidden)
    return (states[0::2] - states[1::2]).mean(0)


def _search(
    encoder: Encoder,
    words: Vocabulary,
    prompt: str,
    goal: np.ndarray,
    breeding: Breeding,
    rng: np.random.Generator,
    bar: str,
) -> Found:
    """bar: the name of the progress bar; empty: there is none."""
    size = len(words.ids), encoder.slots.places.shape[1]
    chosen, scores = rng.integers(size[0], size=(breeding.population, size[1])), np.full(breeding.population, np.nan)
    best, least, queries = chosen[0], np.inf, 0
    for generation in tqdm(range(breeding.generations), desc=bar, disable=not bar):
        new = np.flatnonzero(np.isnan(scores))
        scores[new] = distances(encoder, words.ids[chosen[new]], goal, breeding.population // 2)
        queries += len(new)
        order = np.argsort(scores)[: breeding.population // 2]
        chosen, scores = chosen[order], scores[order]
        if scores[0] < least:
            best, least = chosen[0].copy(), float(scores[0])
        if not np.isfinite(scores[0]) or generation + 1 == breeding.generations:
            break
        chosen, scores = bred(chosen, scores, size[0], breeding, rng)
    return base.best(prompt, [tokens.text(words, best, "")], [least], queries)


def bred(
    chosen: np.ndarray, scores: np.ndarray, words: int, breeding: Breeding, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The next generation [M, k] of prompts [H, k] over `words` words, and their scores [M]: NaN where they changed."""
    count, length = chosen.shape
    joined = np.flatnonzero(rng.random(count) < breeding.crossover)
    other, place = rng.integers(count, size=len(joined)), rng.integers(length, size=len(joined))
    left = np.arange(length) < place[:, None]
    children = [np.where(left, chosen[a], chosen[b]) for a, b in ((joined, other), (other, joined))]
    chosen = np.concatenate([chosen, *children])
    scores = np.concatenate([scores, np.full(2 * len(joined), np.nan)])
    changed = np.flatnonzero(rng.random(len(chosen)) < breeding.mutation)
    chosen[changed, rng.integers(length, size=len(changed))] = rng.integers(words, size=len(changed))
    scores[changed] = np.nan
    return chosen, scores


def distances(encoder: Encoder, ids: np.ndarray, goal: np.ndarray, batch: int) -> np.ndarray:
    """The distance of each prompt, tokens [M, k], from the goal [L, E], computed `batch` at a time: float64 [M].

    Infinite where it is not finite.
    """
    texts = np.repeat(encoder.slots.ids, len(ids), axis=0)
    texts[:, encoder.slots.places[0]] = ids
    found = []
    for start in range(0, len(texts), batch):
        part = texts[start : start + batch]
        padded = np.concatenate([part, np.repeat(part[-1:], batch - len(part), axis=0)])
        found.append(np.asarray(_DISTANCE(encoder.definition, encoder.params, padded, goal))[: len(part)])
    joined = np.concatenate(found) if found else np.zeros(0)
    return np.where(np.isfinite(joined), joined, np.inf)


def distance(definition: Definition, params: Params, ids: jax.Array, goal: jax.Array) -> jax.Array:
    """The squared distance of the states of texts [B, L] from states [L, E], float32 [B]."""
    states = definition.bind(params)(ids).last_hidden_state
    return jnp.square(states.astype(jnp.float32) - goal).sum((1, 2))


_DISTANCE = jax.jit(distance, static_argnums=0)

ATTACK = Attack("ring_a_bell", "Ring-A-Bell", attack, "text encoder", backbones=("sd",))
