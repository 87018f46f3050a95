"""UnlearnDiffAtk (Zhang et al., ECCV 2024): words before a prompt, under which the pipeline denoises its picture."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

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
    search = Search(
        pipeline,
        tokens.vocabulary(pipeline),
        loop.on_device(base.drawing_weights(pipeline)),
        loop.on_device(pipeline.params["text_encoder"]),
        schedule,
    )
    slots = [tokens.before(pipeline, prompt, prefix) for prompt in prompts]
    found = []
    for prompt, places in zip(prompts, slots, strict=True):
        own = int(base.generator(seed, prompt).integers(2**31))
        latents = base.picture(target, prompt, own, ATTACK.title, image_steps, image_guidance)
        found.append(_search(search, prompt, places, latents, times, steps, lr, weight_decay, own, progress))
    return base.together(found)


class Search(NamedTuple):
    """What the searches for all prompts share."""

    pipeline: Pipeline
    vocabulary: Vocabulary
    weights: Params  # the denoiser's
    text_encoder: Params
    schedule: jax.Array


def _search(
    search: Search,
    prompt: str,
    slots: Slots,
    latents: np.ndarray,
    times: int,
    steps: int,
    lr: float,
    weight_decay: float,
    seed: int,
    progress: bool,
) -> Found:
    words, key, apart = search.vocabulary, jax.random.key(seed), len(search.schedule) // times
    models = search.weights, search.text_encoder, words.vectors, search.schedule

    def inputs(i: int):
        t = np.full(1, apart // 2 + i // steps * apart, np.int32)
        return *models, slots.ids, slots.places, latents, t, jax.random.fold_in(key, i), jnp.float32(weight_decay)

    static = word_vectors.static_of(search.pipeline)
    descent = Descent(ATTACK.title, chances_gradient, static, Adam(lr), most_likely, times * steps, steps, onto_simplex)
    uniform = {"chances": jnp.full((slots.places.shape[1], len(words.ids)), 1 / len(words.ids))}
    found, taken = candidates.along(descent, uniform, inputs, progress)
    losses = [measured(search, slots, words.vectors[chosen], latents, key) for chosen in found]
    return base.best(prompt, [tokens.text(words, chosen, prompt) for chosen in found], losses, taken + len(found))


def most_likely(params: Params) -> np.ndarray:
    """The number of the word of every row of "chances", int [k]."""
    return np.argmax(params["chances"], axis=1)


def error(static: Static, weights, text_encoder, schedule, ids, places, vectors, drawn: Drawn) -> jax.Array:
    """The denoising loss under texts [B, L] with word vectors [B, k, C] in their slots."""
    context = Condition(word_vectors.encode(static.text_encoder, text_encoder, ids, places, vectors))
    return denoising_loss(static.denoiser, static.denoiser.bind(weights), context, drawn, schedule)


def chances_gradient(
    static: Static, params: Params, weights, text_encoder, vectors, schedule, ids, places, latents, t, key, decay
) -> tuple[jax.Array, Params]:
    """Loss at words that are drawn from params {"chances": [k, S]}, and what stands for its gradient there."""
    of_words, of_noise = jax.random.split(key)
    chosen = jax.random.categorical(of_words, jnp.log(params["chances"]))
    drawn = Drawn(latents, jax.random.normal(of_noise, latents.shape), t)

    def loss(words: jax.Array) -> jax.Array:
        return error(static, weights, text_encoder, schedule, ids, places, words[None], drawn)

    value, slope = jax.value_and_grad(loss)(vectors[chosen])
    through = jnp.clip(slope @ vectors.T, -1, 1)  # of the one-hot choice, as PyTorch's hardtanh in the authors' code
    return value, {"chances": through + decay * params["chances"]}


def onto_simplex(params: Params) -> Params:
    """Every row of "chances" the nearest probability distribution; the authors find it by bisection."""
    return {"chances": jax.vmap(optax.projections.projection_simplex)(params["chances"])}


def measured(
    search: Search, slots: Slots, vectors: jax.Array | np.ndarray, latents: np.ndarray, key: jax.Array
) -> float:
    """The loss of words [k, C] on noised pictures (`candidates.spread`), the same for every candidate."""
    drawn = candidates.spread(search.schedule, latents, key)
    rows = np.zeros(len(drawn.times), int)
    static, models = word_vectors.static_of(search.pipeline), (search.weights, search.text_encoder, search.schedule)
    return float(_ERROR(static, *models, slots.ids[rows], slots.places[rows], vectors[None][rows], drawn))


_ERROR = jax.jit(error, static_argnums=0)

ATTACK = Attack("unlearndiffatk", "UnlearnDiffAtk", attack, "white-box", backbones=("sd",))
