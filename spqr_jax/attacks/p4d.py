"""Prompting4Debugging (Chin et al., ICML 2024): words under which the pipeline predicts as the unaligned model does."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax import backbones
from spqr_jax.attacks import base, searches, tokens
from spqr_jax.attacks.base import Attack, Attacked
from spqr_jax.attacks.searches import Descent
from spqr_jax.backbones import Condition, Drawn
from spqr_jax.concepts import Concept
from spqr_jax.methods.tools import word_vectors
from spqr_jax.methods.tools.loop import Adam
from spqr_jax.methods.tools.word_vectors import Static
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
    slots = searches.stacked([tokens.before(pipeline, text, length) for text in texts])
    words, seeds, starts = tokens.vocabulary(pipeline), [], []
    for prompt in prompts:
        rng = base.generator(seed, prompt)
        seeds.append(int(rng.integers(2**31)))
        starts.append(rng.integers(len(words.ids), size=length))
    latents = base.pictures(target, prompts, seeds, image_steps, image_guidance)
    said = backbones.condition(target, prompts)
    goals = searches.stacked([said.rows(slice(n, n + 1)) for n in range(len(prompts))])
    models = Models(
        base.drawing_weights(pipeline),
        pipeline.params["text_encoder"],
        base.drawing_weights(target),
        words.vectors,
        backbones.schedule(pipeline),
    )
    static, adam = word_vectors.static_of(pipeline), Adam(lr, weight_decay)
    descent = Descent(ATTACK.title, gradient, look, static, adam, steps, every)
    first = {"vectors": np.asarray(words.vectors)[np.stack(starts)]}
    own = Own(slots, goals, latents, np.array(seeds, np.uint32))
    courses = searches.along(descent, first, models, own, progress)
    found = [
        base.best(
            prompt, [tokens.text(words, chosen, rest) for chosen in course.candidates], course.losses, course.queries
        )
        for prompt, rest, course in zip(prompts, texts, courses, strict=True)
    ]
    return base.together(found)


class Models(NamedTuple):
    """What the searches for all prompts read: both denoisers' weights, the vocabulary [S, C], abar_t [T]."""

    weights: Params
    text_encoder: Params
    unaligned: Params  # the denoiser's of the target
    vectors: jax.Array
    schedule: jax.Array


class Own(NamedTuple):
    """What the search for one prompt reads: the text of slots, one row; the prompt as the unaligned model has it, its
    condition, one row, and the latents [1, h, w, C] of its picture."""

    slots: Any  # Slots
    goal: Condition
    latents: Any
    seed: Any


def nearest(vectors: jax.Array, words: jax.Array) -> jax.Array:
    """For each vector [k, C] the number of the nearest word [S, C] by cosine, int [k]."""
    unit = words / jnp.linalg.norm(words, axis=1, keepdims=True)
    return jnp.argmax(vectors @ unit.T, axis=1)  # a vector's own length changes nothing


def gap(static: Static, models: Models, own: Own, context: Condition, drawn: Drawn) -> jax.Array:
    """The equation above for what the denoiser reads of c*, one row."""
    noisy = static.denoiser.mix(models.schedule, drawn)
    wanted = jax.lax.stop_gradient(static.denoiser.bind(models.unaligned)(noisy, drawn.times, own.goal))
    found = static.denoiser.bind(models.weights)(noisy, drawn.times, context)
    return jnp.square((found - wanted).astype(jnp.float32)).mean()


def gradient(static: Static, params: Params, i: jax.Array, models: Models, own: Own) -> tuple[jax.Array, Params]:
    """Loss and gradient at the words nearest to params {"vectors": [k, C]}, at a time and noise of step i."""
    key = jax.random.fold_in(jax.random.key(own.seed), i)
    drawn = static.denoiser.draw(key, own.latents, jnp.zeros_like(own.latents), models.schedule)

    def loss(words: jax.Array) -> jax.Array:
        return gap(static, models, own, read(static, models, own, words), drawn)

    value, slope = jax.value_and_grad(loss)(models.vectors[nearest(params["vectors"], models.vectors)])
    return value, {"vectors": slope}


def look(static: Static, params: Params, models: Models, own: Own) -> tuple[jax.Array, jax.Array]:
    """(the nearest words, their numbers [k]; their loss)."""
    chosen = nearest(params["vectors"], models.vectors)
    return chosen, measured(static, models, own, chosen)


def measured(static: Static, models: Models, own: Own, chosen: jax.Array) -> jax.Array:
    """The loss of words, their numbers [k], on noised pictures that are the same for every candidate."""
    context, key = read(static, models, own, models.vectors[chosen]), jax.random.key(own.seed)
    return searches.mean_over_times(
        lambda drawn: gap(static, models, own, context, drawn), models.schedule, own.latents, key
    )


def read(static: Static, models: Models, own: Own, words: jax.Array) -> Condition:
    """What the denoiser reads of word vectors [k, C] in the slots: one row."""
    ids, places = own.slots
    return Condition(word_vectors.encode(static.text_encoder, models.text_encoder, ids, places, words[None]))


ATTACK = Attack("p4d", "P4D", attack, "white-box", backbones=("sd",))
