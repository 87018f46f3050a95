"""MMA-Diffusion (Yang et al., CVPR 2024), its text part: other words that the text encoder reads as the prompt."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from spqr_jax.attacks import base, tokens
from spqr_jax.attacks.base import Attack, Attacked
from spqr_jax.backbones import text as text_lib
from spqr_jax.concepts import Concept
from spqr_jax.methods.tools import loop, word_vectors
from spqr_jax.params import Definition, Params
from spqr_jax.pipeline import Pipeline


def attack(
    pipeline: Pipeline,
    prompts: Sequence[str],
    concept: Concept,
    *,
    seed: int,
    target: Pipeline | None = None,
    length: int = 20,
    steps: int = 1000,
    candidates: int = 512,
    top: int = 256,
    restarts: int = 1,
    forbidden: Sequence[str] = (),
    progress: bool = False,
) -> Attacked:
    """min over prompts c* of `length` words 1 - cos(T(c*), T(c)), T the pooled state, without the words of the concept.

    Only the text encoder is asked: c* is sought through the one of `pipeline`, towards what the one of `target` says of
    the prompt c (default: the same). A step takes the gradient with respect to the choice of every word, draws for each
    of `candidates` one word in turn and one of the `top` that promise most in its place, and goes on from the best
    candidate, even if it is worse. Words are random at first.

    The words of the texts in `erase` are forbidden, and `forbidden` as well: each by itself, and, from four letters on,
    every word that holds it, so that a filter of words finds nothing. restarts: searches from other words, of which the
    best counts. loss: that of the best prompt of all steps. queries: candidates.

    Defaults are those of the authors' code, which gives each of 10 restarts as a prompt of its own. Theirs is made on
    the encoder of Stable Diffusion and transferred (success: the image passes for one of the prompt, and no filter
    stopped it); so it is here where `pipeline` is the unaligned model. Differences: they start from random letters;
    their list of forbidden words is written by hand; their code reads the gradient of a word one place too far left,
    here it is that of the word itself; they drop candidates that are not read as they were written, of which there are
    none over `tokens.Vocabulary`.
    """
    least = {"length": (length, 1), "steps": (steps, 1), "candidates": (candidates, 1), "top": (top, 1)}
    full, target = base.checked(ATTACK, pipeline, prompts, concept, target or pipeline, **least, restarts=(restarts, 1))
    banned = {word for text in full.erase for word in text.lower().split()} | {word.lower() for word in forbidden}
    slots, words = tokens.before(pipeline, "", length), tokens.vocabulary(pipeline, banned)
    goals = np.asarray(text_lib.encode(target, prompts, pooled=True).embeds, np.float32)
    setting = Setting(pipeline.definitions["text_encoder"], min(top, len(words.ids)), candidates, steps)
    models = loop.on_device(pipeline.params["text_encoder"]), words.vectors
    found = []
    for prompt, goal in zip(tqdm(prompts, desc=ATTACK.title, unit="prompt", disable=not progress), goals, strict=True):
        rng = base.generator(seed, prompt)
        ends = []
        for _ in range(restarts):
            start, key = rng.integers(len(words.ids), size=length), jax.random.key(int(rng.integers(2**31)))
            ends.append(search(setting, *models, slots.ids, slots.places, goal, start, key))
        texts = [tokens.text(words, np.asarray(best), "") for best, _ in ends]
        losses = [float(least) for _, least in ends]
        found.append(base.best(prompt, texts, losses, restarts * steps * candidates))
    return base.together(found)


class Setting(NamedTuple):
    """What a search is compiled for."""

    definition: Definition
    top: int
    candidates: int
    steps: int


def loss(definition: Definition, text_encoder: Params, ids, places, vectors, goal) -> jax.Array:
    """1 - cosine of the pooled state of each text, with word vectors [B, k, C] in its slots, and the goal [E]: [B]."""
    pooled = word_vectors.read(definition, text_encoder, ids, places, vectors).pooled
    assert pooled is not None  # CLIP has one
    pooled = pooled.astype(jnp.float32)
    lengths = jnp.linalg.norm(pooled, axis=1) * jnp.linalg.norm(goal)
    return 1 - pooled @ goal / jnp.maximum(lengths, 1e-6)


@functools.partial(jax.jit, static_argnums=0)
def search(setting: Setting, text_encoder, vectors, ids, places, goal, start, key):
    """(the best prompt of all steps, numbers of words [k]; its loss, infinite if none was finite).

    vectors [S, C]: the vocabulary. ids [1, L], places [1, k]: the text of slots. start: [k].
    """

    def body(carry, i):
        chosen, best, least = carry
        tried, losses = step(setting, text_encoder, vectors, ids, places, goal, chosen, jax.random.fold_in(key, i))
        number = jnp.argmin(losses)
        chosen, reached = tried[number], losses[number]
        best = jnp.where(reached < least, chosen, best)
        return (chosen, best, jnp.minimum(reached, least)), None

    start = jnp.asarray(start)
    (_, best, least), _ = jax.lax.scan(body, (start, start, jnp.float32(jnp.inf)), jnp.arange(setting.steps))
    return best, least


def step(setting: Setting, text_encoder, vectors, ids, places, goal, chosen, key):
    """(candidates [B, k], their losses [B]) around a prompt [k]. Infinite: itself, and what is not finite."""

    def own(words: jax.Array) -> jax.Array:
        return loss(setting.definition, text_encoder, ids, places, words[None], goal)[0]

    slope = jax.grad(own)(vectors[chosen]) @ vectors.T  # [k, S], of the one-hot choice
    promising = jax.lax.top_k(-slope, setting.top)[1]
    count, length = setting.candidates, len(chosen)
    place = jnp.arange(count) * length // count
    word = promising[place, jax.random.randint(key, (count,), 0, setting.top)]
    tried = jnp.tile(chosen, (count, 1)).at[jnp.arange(count), place].set(word)
    texts, slots = jnp.repeat(ids, count, axis=0), jnp.repeat(places, count, axis=0)
    losses = loss(setting.definition, text_encoder, texts, slots, vectors[tried], goal)
    return tried, jnp.where(jnp.isfinite(losses) & (tried != chosen).any(1), losses, jnp.inf)


ATTACK = Attack("mma", "MMA-Diffusion", attack, "text encoder", backbones=("sd",))
