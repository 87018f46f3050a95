"""UnlearnDiffAtk (Zhang et al., ECCV 2024): words before a prompt, under which the pipeline denoises its picture."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

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
from spqr_jax.training.objective import denoising_loss


def attack(
    pipeline: Pipeline,
    prompts: Sequence[str],
    concept: Concept,
    *,
    seed: int,
    target: Pipeline | None = None,
    prefix: int = 5,
    times: int = 50,
    steps: int = 40,
    lr: float = 0.01,
    weight_decay: float = 0.1,
    image_steps: int = 50,
    image_guidance: float = 7.5,
    progress: bool = False,
) -> Attacked:
    """Projected gradient descent over the choice of `prefix` words c* before the prompt c:

        min E_noise || eps(z_t, T(c* c)) - noise ||^2,   z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) noise,

    z_0 a picture of c drawn by `target`: the pipeline itself is the classifier that says what its prompt must show.
    Each word is a distribution over the vocabulary, uniform at first. A step draws a word from each, takes the gradient
    there for that of the distributions (straight through, cut to -1..1), makes a step of Adam with L2 decay, and
    projects onto the simplex. t goes through `times` values evenly apart, from clean to noisy, `steps` steps each;
    after each the most likely words are a candidate.

    loss: that of the best candidate, over 10 times and noises that are the same for every candidate and pipeline.
    queries: steps, and candidates.

    Defaults are those of the authors' code for nudity, violence and illegal activity (prefix=3 for styles and objects);
    pictures are drawn there in 100 steps of LMS. Success there is a candidate whose image, with the prompt's own seed,
    a classifier flags: each of the up to 50 is drawn and judged, and the first stops the search. Here no judge takes
    part, and one candidate is kept. The vocabulary is that of `tokens.Vocabulary`, theirs is all tokens.
    """
    least = {"prefix": (prefix, 1), "times": (times, 1), "steps": (steps, 1)}
    _, target = base.checked(ATTACK, pipeline, prompts, concept, target, **least)
    schedule = backbones.schedule(pipeline)
    if times > len(schedule):
        raise ValueError(f"{ATTACK.title}: times={times}, expected at most the {len(schedule)} times of training.")
    words, slots = tokens.vocabulary(pipeline), searches.stacked([tokens.before(pipeline, p, prefix) for p in prompts])
    seeds = [int(base.generator(seed, prompt).integers(2**31)) for prompt in prompts]
    latents = base.pictures(target, prompts, seeds, image_steps, image_guidance)
    apart = len(schedule) // times
    pace = Pace(np.int32(steps), np.int32(apart), np.float32(weight_decay))
    models = base.drawing_weights(pipeline), pipeline.params["text_encoder"], words.vectors, schedule
    static, adam = word_vectors.static_of(pipeline), Adam(lr)
    descent = Descent(ATTACK.title, chances_gradient, look, static, adam, times * steps, steps, onto_simplex)
    uniform = np.full((len(prompts), prefix, len(words.ids)), 1 / len(words.ids), np.float32)
    own = Own(slots, latents, np.array(seeds, np.uint32))
    courses = searches.along(descent, {"chances": uniform}, (Models(*models), pace), own, progress)
    found = [
        base.best(
            prompt, [tokens.text(words, chosen, prompt) for chosen in course.candidates], course.losses, course.queries
        )
        for prompt, course in zip(prompts, courses, strict=True)
    ]
    return base.together(found)


class Models(NamedTuple):
    """What the searches for all prompts read: the denoiser's weights, the vocabulary's vectors [S, C], abar_t [T]."""

    weights: Params
    text_encoder: Params
    vectors: jax.Array
    schedule: jax.Array


class Pace(NamedTuple):
    """Steps at one time, the distance between two times, and the L2 decay."""

    steps: Any
    apart: Any
    decay: Any


class Own(NamedTuple):
    """What the search for one prompt reads: the prompt behind slots, one row, and its picture, latents [1, h, w, C]."""

    slots: Any  # Slots
    latents: Any
    seed: Any


def chances_gradient(
    static: Static, params: Params, i: jax.Array, shared: tuple[Models, Pace], own: Own
) -> tuple[jax.Array, Params]:
    """Loss at words that are drawn from params {"chances": [k, S]}, and what stands for its gradient there."""
    models, pace = shared
    of_words, of_noise = jax.random.split(jax.random.fold_in(jax.random.key(own.seed), i))
    chosen = jax.random.categorical(of_words, jnp.log(params["chances"]))
    t = (pace.apart // 2 + i // pace.steps * pace.apart)[None]
    drawn = Drawn(own.latents, jax.random.normal(of_noise, own.latents.shape), t)

    def loss(words: jax.Array) -> jax.Array:
        context = read(static, models, own, words)
        return denoising_loss(static.denoiser, static.denoiser.bind(models.weights), context, drawn, models.schedule)

    value, slope = jax.value_and_grad(loss)(models.vectors[chosen])
    through = jnp.clip(slope @ models.vectors.T, -1, 1)  # of the one-hot choice, as PyTorch's hardtanh in their code
    return value, {"chances": through + pace.decay * params["chances"]}


def onto_simplex(params: Params) -> Params:
    """Every row of "chances" the nearest probability distribution; the authors find it by bisection."""
    return {"chances": jax.vmap(optax.projections.projection_simplex)(params["chances"])}


def look(static: Static, params: Params, shared: tuple[Models, Pace], own: Own) -> tuple[jax.Array, jax.Array]:
    """(the most likely words, their numbers [k]; their loss)."""
    chosen = jnp.argmax(params["chances"], axis=1)
    return chosen, measured(static, shared[0], own, chosen)


def measured(static: Static, models: Models, own: Own, chosen: jax.Array) -> jax.Array:
    """The loss of words, their numbers [k], on noised pictures that are the same for every candidate."""
    predict, context = static.denoiser.bind(models.weights), read(static, models, own, models.vectors[chosen])
    return searches.mean_over_times(
        lambda drawn: denoising_loss(static.denoiser, predict, context, drawn, models.schedule),
        models.schedule,
        own.latents,
        jax.random.key(own.seed),
    )


def read(static: Static, models: Models, own: Own, words: jax.Array) -> Condition:
    """What the denoiser reads of the prompt with word vectors [k, C] before it: one row."""
    ids, places = own.slots
    return Condition(word_vectors.encode(static.text_encoder, models.text_encoder, ids, places, words[None]))


ATTACK = Attack("unlearndiffatk", "UnlearnDiffAtk", attack, "white-box", backbones=("sd",))
