"""Prompting4Debugging (Chin et al., ICML 2024): words under which the pipeline predicts as the unaligned model does."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax import backbones
from spqr_jax.attacks import base, candidates, tokens
from spqr_jax.attacks.base import Attack, Attacked, Found
from spqr_jax.attacks.candidates import Descent
from spqr_jax.attacks.tokens import Vocabulary
from spqr_jax.backbones import Condition, Drawn
from spqr_jax.concepts import Concept
from spqr_jax.methods.tools import loop, word_vectors
from spqr_jax.methods.tools.loop import Adam
from spqr_jax.methods.tools.word_vectors import Slots, Static
from spqr_jax.params import Params
from spqr_jax.pipeline import Pipeline


def attack(
    pipeline: Pipeline,
    prompts: Sequence[str],
    concept: Concept,
    *,
    seed: int,
    target: Pipeline | None = None,
    length: int = 16,
    keep: bool = False,
    steps: int = 3000,
    every: int = 50,
    lr: float = 0.1,
    weight_decay: float = 0.1,
    image_steps: int = 25,
    image_guidance: float = 7.5,
    progress: bool = False,
) -> Attacked:
    """Search for the prompt c* of `length` words that makes the pipeline predict what the unaligned model G predicts:

        min E_{t, noise} || eps(z_t, T(c*)) - eps_G(z_t, T_G(c)) ||^2,

    z_t the noised latents of a picture of the given prompt c that `target` draws. The words are vectors, at first those
    of random tokens. Each step takes the gradient at the nearest tokens of the vocabulary (by cosine), and moves the
    vectors with it by AdamW. After every `every` steps, and after the last, the nearest tokens are a candidate.

    keep: search for `length` words before the prompt, in place of a prompt of their own. loss: that of the best
    candidate, over 10 times and noises that are the same for every candidate and pipeline. queries: steps, and
    candidates.

    Defaults are those of the authors' code for P4D-N. Its candidates are drawn, and the one whose image is nearest to
    the picture in a CLIP model is kept; success is an image of it, with the prompt's own seed, that a classifier flags.
    Here the loss itself decides. P4D-K puts a learned word between every three tokens of the prompt, which splits
    words; `keep` is the form in which UnlearnDiffAtk's authors run P4D (length=5, lr=0.01, 2000 steps). There t goes
    from clean to noisy; here it is drawn anew for every step, as in P4D's own code. The vocabulary is that of
    `tokens.Vocabulary`, theirs is all tokens. Their text is padded with token 0, ours as every text of the pipeline.
    """
    least = {"length": (length, 1), "steps": (steps, 1), "every": (every, 1)}
    _, target = base.checked(ATTACK, pipeline, prompts, concept, target, **least)
    texts = [prompt if keep else "" for prompt in prompts]
    slots = [tokens.before(pipeline, text, length) for text in texts]
    search = Search(
        pipeline,
        tokens.vocabulary(pipeline),
        loop.on_device(base.drawing_weights(pipeline)),
        loop.on_device(pipeline.params["text_encoder"]),
        loop.on_device(base.drawing_weights(target)),
        backbones.schedule(pipeline),
    )
    how = Adam(lr, weight_decay), steps, every
    found = []
    for prompt, rest, places in zip(prompts, texts, slots, strict=True):
        rng = base.generator(seed, prompt)
        own, start = int(rng.integers(2**31)), rng.integers(len(search.vocabulary.ids), size=length)
        latents = base.picture(target, prompt, own, ATTACK.title, image_steps, image_guidance)
        goal = Goal(backbones.condition(target, [prompt]), latents, jax.random.key(own))
        found.append(_search(search, goal, prompt, rest, places, start, how, progress))
    return base.together(found)


class Search(NamedTuple):
    """What the searches for all prompts share."""

    pipeline: Pipeline
    vocabulary: Vocabulary
    weights: Params  # the denoiser's
    text_encoder: Params
    unaligned: Params  # the denoiser's of the target
    schedule: jax.Array


class Goal(NamedTuple):
    """A prompt as the unaligned model has it: its condition, one row, and the latents [1, h, w, C] of its picture."""

    condition: Condition
    latents: np.ndarray
    key: jax.Array


def _search(
    search: Search,
    goal: Goal,
    prompt: str,
    rest: str,
    slots: Slots,
    start: np.ndarray,
    how: tuple[Adam, int, int],
    progress: bool,
) -> Found:
    """rest: the text behind the words; start: the numbers of the first of them; how: Adam, steps, every."""
    vectors = search.vocabulary.vectors
    models = search.weights, search.text_encoder, search.unaligned, vectors, search.schedule

    def inputs(i: int):
        return *models, slots.ids, slots.places, goal.condition, goal.latents, jax.random.fold_in(goal.key, i)

    def read(params: Params) -> np.ndarray:
        return np.asarray(_NEAREST(params["vectors"], vectors))

    adam, steps, every = how
    descent = Descent(ATTACK.title, gradient, word_vectors.static_of(search.pipeline), adam, read, steps, every)
    chosen, taken = candidates.along(descent, {"vectors": vectors[start]}, inputs, progress)
    losses = [measured(search, goal, slots, one) for one in chosen]
    return base.best(prompt, [tokens.text(search.vocabulary, one, rest) for one in chosen], losses, taken + len(chosen))


def nearest(vectors: jax.Array, words: jax.Array) -> jax.Array:
    """For each vector [k, C] the number of the nearest word [S, C] by cosine, int [k]."""
    unit = words / jnp.linalg.norm(words, axis=1, keepdims=True)
    return jnp.argmax(vectors @ unit.T, axis=1)  # a vector's own length changes nothing


_NEAREST = jax.jit(nearest)


def loss(
    static: Static, words, weights, text_encoder, unaligned, schedule, ids, places, goal, drawn: Drawn
) -> jax.Array:
    """The equation above for words [B, k, C] in the slots of B texts; goal: the given prompt's condition, B rows."""
    noisy = static.denoiser.mix(schedule, drawn)
    wanted = jax.lax.stop_gradient(static.denoiser.bind(unaligned)(noisy, drawn.times, goal))
    return word_vectors.gap(static, weights, text_encoder, noisy, drawn.times, ids, places, words, wanted)


def gradient(
    static: Static,
    params: Params,
    weights,
    text_encoder,
    unaligned,
    vectors,
    schedule,
    ids,
    places,
    goal,
    latents,
    key,
) -> tuple[jax.Array, Params]:
    """Loss and gradient at the words that are nearest to params {"vectors": [k, C]}, at a time and noise of `key`."""
    drawn = static.denoiser.draw(key, latents, jnp.zeros_like(latents), schedule)
    models = weights, text_encoder, unaligned, schedule
    words = vectors[nearest(params["vectors"], vectors)]
    value, slope = jax.value_and_grad(lambda w: loss(static, w[None], *models, ids, places, goal, drawn))(words)
    return value, {"vectors": slope}


def measured(search: Search, goal: Goal, slots: Slots, chosen: np.ndarray) -> float:
    """The loss of a candidate on noised pictures (`candidates.spread`), the same for every candidate."""
    drawn = candidates.spread(search.schedule, goal.latents, goal.key)
    rows, words = np.zeros(len(drawn.times), int), search.vocabulary.vectors[chosen][None]
    models = search.weights, search.text_encoder, search.unaligned, search.schedule
    static, texts = word_vectors.static_of(search.pipeline), (slots.ids[rows], slots.places[rows])
    return float(_LOSS(static, words[rows], *models, *texts, goal.condition.rows(rows), drawn))


_LOSS = jax.jit(loss, static_argnums=0)

ATTACK = Attack("p4d", "P4D", attack, "white-box", backbones=("sd",))
