"""EraseAnything (Gao et al., ICML 2025): erase and preserve in turn, by an adapter on FLUX's text queries and keys."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax import backbones
from spqr_jax.backbones import Condition, Denoiser, flux
from spqr_jax.backbones.base import Array
from spqr_jax.concepts import Concept
from spqr_jax.methods.base import Method
from spqr_jax.methods.tools import attention_maps, loop, low_rank
from spqr_jax.methods.tools import pictures as pictures_lib
from spqr_jax.methods.tools.concepts import completed, require_tokens
from spqr_jax.methods.tools.loop import Adam
from spqr_jax.methods.tools.low_rank import Adapter, Added
from spqr_jax.methods.tools.negative_guidance import erasing_loss
from spqr_jax.methods.tools.pictures import Pictures
from spqr_jax.params import Params
from spqr_jax.pipeline import Pipeline
from spqr_jax.sampling import partial
from spqr_jax.sampling.attached.delta import add
from spqr_jax.sampling.partial import Sampler

TEMPLATE = "a photo of {}"
# Shares of prompts whose words are shuffled, and that name a synonym instead, as in the authors' code.
SHUFFLED, REPLACED = 0.9, 0.5
TEMPERATURE = 0.07


class Strengths(NamedTuple):
    """Factors of the four losses."""

    erasing: float
    attention: float
    image: float
    contrast: float


def align(
    pipeline: Pipeline,
    concept: Concept,
    *,
    seed: int = 0,
    images: int = 8,
    steps: int = 1000,
    lr: float = 1e-3,
    preserving_lr: float = 5e-4,
    weight_decay: float = 1e-5,
    rank: int = 8,
    eta: float = 1.0,
    neutral: str = "",
    synonyms: Sequence[str] = (),
    irrelevant: int = 3,
    strengths: Sequence[float] = (1.0, 0.001, 0.1, 0.1),
    guidance: float = 3.5,
    pictures: str = "",
    sampling_steps: int = 28,
    sampling_guidance: float = 3.0,
    progress: bool = False,
) -> Pipeline:
    """Train an adapter of `rank` on queries and keys of text tokens in double blocks, and merge it.

    Every second step erases, by ESD's loss with `eta` (paper eq. 2), and by the attention that the last double block
    pays to the concept's tokens on a noised image of it (eq. 3). The steps between preserve, at the time of the step
    before, by the flow objective on such an image under its prompt (eq. 4), and by the reverse self-contrastive loss
    (eq. 5). That moves the attention to the concept's tokens away from that to a synonym's, and towards that to
    unrelated words. One AdamW has the rate `lr` in the first steps, `preserving_lr` in the others, and `weight_decay`.

    Args:
        images: how many of each text, made by the base model from the concept's first template ("a photo of {}"). In
            training its words are shuffled, so that the place in the sentence is not what is learned.
        pictures: a data source used instead (`pictures_lib.read`); its captions say which text an image shows.
        neutral: the text that ESD's loss moves to; the paper has none.
        synonyms: of the concept; default: the other texts of `erase`, else the text itself. Half of the prompts name
            one. The authors take them from WordNet.
        irrelevant: how many of the concept's `retain` texts (default `preserve`) a preserving step draws. The authors
            ask a language model for three words.
        strengths: factors of the four losses in the order above.
        guidance: what dev reads on noised images; `sampling_guidance` is what it reads in samples and in ESD's loss.

    The authors' code was read whole, and the paper in summaries that quote its equations and settings. Rates and number
    of steps are the paper's. It names neither rank, strengths nor images: rank and strengths are the code's, which
    ships no images. The code's configs take 200 steps at 1e-3 for nudity, and a benign sentence as `neutral`.

    Where ours differs from the code:
    - ESD's target is of the frozen model, as in the paper; there it is of the student itself.
    - ESD's latents stand at the time that its loss is taken at; there they are finished samples, at any time.
    - Eq. 5 compares the concept with each text, as in the paper; there the synonym is compared with the concept and the
      unrelated words, which then have no effect on its gradient but as a weight. Its sign is that of the code and of
      the paper's words; the formula that is quoted has the other.
    - The tokens that are watched are those of the text that a prompt names; there the places of the concept's name,
      whatever stands in them.
    As in the code, eq. 3 takes norms over heads, and eq. 5 the first head's map, averaged over the text's tokens.

    Raises ValueError for other backbones than FLUX.1, and for a concept with no text to retain. On FLUX.1 schnell set
    `sampling_guidance` to 0.
    """
    METHOD.check_backbone(pipeline)
    loop.check_at_least("EraseAnything", images=(images, 1), rank=(rank, 1), irrelevant=(irrelevant, 1))
    if len(strengths) != len(Strengths._fields):
        raise ValueError(f"EraseAnything: strengths={tuple(strengths)}, expected {len(Strengths._fields)} numbers.")
    full = completed(concept._replace(templates=concept.templates or (TEMPLATE,)), pipeline, "retain")
    require_tokens("EraseAnything", "synonyms", synonyms, pipeline)
    sampler = partial.sampler(pipeline, sampling_steps, sampling_guidance)
    shown = pictures_lib.make(
        pipeline,
        [full.templates[0].format(text) for text in full.erase],
        images * len(full.erase),
        seed=seed,
        given=pictures,
        texts=full.erase,
        name="EraseAnything",
        steps=sampling_steps,
        guidance=sampling_guidance,
    )
    plan = list(planned(full, shown, tuple(synonyms), irrelevant, steps, seed))
    course = Course(seed, eta, guidance, progress)
    adam = Adam(lr, weight_decay=weight_decay, second_lr=preserving_lr)
    texts = encode(pipeline, plan, neutral)
    return fit(pipeline, sampler, shown, texts, plan, rank, adam, Strengths(*strengths), course)


# --- texts -----------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """The image of a step, int [1]; its prompt, what that names, and the texts it is compared with, a synonym first."""

    picture: np.ndarray
    prompt: str
    named: str
    others: tuple[str, ...]


def planned(
    concept: Concept, shown: Pictures, synonyms: tuple[str, ...], irrelevant: int, steps: int, seed: int
) -> Iterator[Step]:
    """The steps, for a completed concept; only preserving ones have texts to compare with."""
    for i, picture in enumerate(pictures_lib.rows(shown, 1, steps, seed)):
        text, rng = concept.erase[shown.prompt[picture[0]] % len(concept.erase)], np.random.default_rng((seed, i, 2))
        same = synonyms or tuple(other for other in concept.erase if other != text) or (text,)
        prompt, named = reworded(concept.templates[0], text, same, rng)
        drawn = rng.choice(len(concept.retain), irrelevant, replace=irrelevant > len(concept.retain))
        others = (same[int(rng.integers(len(same)))], *(concept.retain[number] for number in drawn))
        yield Step(picture, prompt, named, others if i % 2 else ())


def reworded(template: str, text: str, synonyms: Sequence[str], rng: np.random.Generator) -> tuple[str, str]:
    """(a prompt with its words in random order, the text or the synonym that it names)."""
    words = template.split()
    order = rng.permutation(len(words)) if rng.random() < SHUFFLED else range(len(words))
    named = synonyms[int(rng.integers(len(synonyms)))] if rng.random() < REPLACED else text
    return " ".join(words[i] for i in order).format(named), named


class Texts(NamedTuple):
    """Encoded prompts, the neutral one last, and which tokens of T5 name what in them, bool [M]."""

    rows: dict[str, int]
    condition: Condition
    watched: dict[tuple[str, str], np.ndarray]

    def of(self, prompt: str, named: str, scale: np.ndarray | None) -> tuple[Condition, np.ndarray]:
        """A prompt under a scale of guidance [1], and the tokens [M] of what it names."""
        return self.condition.rows([self.rows[prompt]]).guided(scale), self.watched[prompt, named]

    def neutral(self) -> Condition:
        return self.condition.rows([-1])


def encode(pipeline: Pipeline, plan: Sequence[Step], neutral: str) -> Texts:
    """All texts of a plan, each once. Raises ValueError for one that does not fit into the length of texts."""
    pairs = [(step.prompt, step.named) for step in plan] + [(other, other) for step in plan for other in step.others]
    prompts = list(dict.fromkeys(prompt for prompt, _ in pairs))
    condition = backbones.condition(pipeline, [*prompts, neutral])
    length = condition.context.shape[1]
    watched = {pair: attention_maps.positions_t5(pipeline, *pair, length) for pair in dict.fromkeys(pairs)}
    return Texts({prompt: row for row, prompt in enumerate(prompts)}, condition, watched)


# --- one step --------------------------------------------------------------------------------------------------------


class Static(NamedTuple):
    """What a step is compiled for: the denoiser, (frozen weights, adapter) -> the student's weights, and strengths."""

    denoiser: Denoiser
    build: Added
    strengths: Strengths


class Image(NamedTuple):
    """An image of the concept: mean and std [1, h, w, C] of its latents, times [1], prompt and watched tokens [M]."""

    mean: Array
    std: Array
    times: Array
    text: Condition
    watched: Array


class Erasing(NamedTuple):
    """A step that erases: the student's latents [1, h, w, C] at the image's time, its prompt, no text, and eta."""

    latents: Array
    text: Condition
    neutral: Condition
    eta: np.float32


class Preserving(NamedTuple):
    """A step that preserves: features [N, L] of the texts that the concept is compared with, the synonym's first."""

    others: Array


Turn = Erasing | Preserving


def attention_loss(attended: Array, watched: Array) -> jax.Array:
    """Attention [B, heads, L, L] to watched text tokens, bool [M]: norms over batch and heads, summed."""
    squares = jnp.square(attended[..., : len(watched)]).sum((0, 1))
    counted = watched & (squares > 0)  # the root of zero has no gradient
    return jnp.where(counted, jnp.sqrt(jnp.where(counted, squares, 1)), 0).sum()


def feature(attended: Array, watched: Array) -> jax.Array:
    """Attention [1, heads, L, L] of the first head to watched text tokens, bool [M]: their mean, of norm 1, [L]."""
    mean = attended[0, 0, :, : len(watched)] @ (watched / watched.sum())
    return mean / jnp.linalg.norm(mean)


def contrast_loss(own: Array, others: Array) -> jax.Array:
    """The log-probability of the first among `others` [N, L], by their similarity to `own` [L]: InfoNCE, reversed."""
    return jax.nn.log_softmax(others @ own / TEMPERATURE)[0]


def loss(static: Static, adapter: Adapter, frozen: Params, schedule, image: Image, turn: Turn, key) -> jax.Array:
    """The two losses of a turn, each times its strength."""
    denoiser, weights, strengths = static.denoiser, static.build(frozen, adapter), static.strengths
    drawn = denoiser.draw(key, image.mean, image.std, schedule)._replace(times=jnp.asarray(image.times))
    model, noisy = denoiser.definition.bind(weights), denoiser.mix(schedule, drawn)
    predicted, attended = flux.predict_and_attend(model, noisy, image.times, image.text)
    if isinstance(turn, Erasing):
        student, teacher = denoiser.of_model(model), denoiser.bind(frozen)
        erased = erasing_loss(student, teacher, turn.latents, image.times, turn.text, turn.neutral, turn.eta)
        return strengths.erasing * erased + strengths.attention * attention_loss(attended, image.watched)
    target = denoiser.backbone.noising.target(denoiser.prediction, schedule, drawn)
    kept = jnp.square(predicted.astype(jnp.float32) - target).mean()
    return strengths.image * kept + strengths.contrast * contrast_loss(feature(attended, image.watched), turn.others)


# What `fit` trains with; compiled programs are kept by it.
GRADIENT: Any = loop.descent(loss)


# --- training --------------------------------------------------------------------------------------------------------


class Course(NamedTuple):
    """Options of training that are not compiled into its steps."""

    seed: int
    eta: float
    guidance: float
    progress: bool


def fit(
    pipeline: Pipeline,
    sampler: Sampler,
    shown: Pictures,
    texts: Texts,
    plan: Sequence[Step],
    rank: int,
    adam: Adam,
    strengths: Strengths,
    course: Course,
) -> Pipeline:
    """The pipeline with an adapter merged that was trained by this plan."""
    backbone, seed = backbones.of(pipeline), course.seed
    weights = backbone.weights(pipeline)
    schedule, base = backbones.schedule(pipeline), jax.random.key(seed)
    static = Static(sampler.denoiser, Added(), strengths)
    adapter = low_rank.create(weights, flux.TEXT_ATTENTION, rank=rank, seed=seed, normal=True, name="EraseAnything")

    def inputs(i: int, adapter: Adapter, weights: Params):
        step, rng = plan[i], np.random.default_rng((seed, i))
        moment = int(np.random.default_rng((seed, i // 2, 1)).integers(sampler.steps))  # of both turns
        text, watched = texts.of(step.prompt, step.named, told(sampler, course.guidance))
        times = sampler.times(moment, 1, rng)
        image = Image(shown.mean[step.picture], shown.std[step.picture], times, text, watched)
        student = static.build(weights, adapter)
        if i % 2:
            turn: Turn = Preserving(features(sampler, student, texts, step.others, rng))
        else:
            turn = erasing(sampler, student, texts, step, moment, course.eta, rng)
        return schedule, image, turn, jax.random.fold_in(base, i)

    name, count, frozen = "EraseAnything", len(plan), (weights,)
    tuned = loop.fit(name, GRADIENT, static, adam, adapter, inputs, count, frozen=frozen, progress=course.progress)
    return backbone.with_weights(pipeline, loop.on_host(add(weights, low_rank.delta(tuned))))


def told(sampler: Sampler, scale: float | None) -> np.ndarray | None:
    """The scale of guidance [1] that a denoiser reads; None if it reads none."""
    return None if sampler.told is None else np.full(1, scale, np.float32)


def erasing(
    sampler: Sampler, student: Params, texts: Texts, step: Step, moment: int, eta: float, rng: np.random.Generator
) -> Erasing:
    """The student's sample of the prompt, down to the sampler's step number `moment` from the clean end."""
    scale = told(sampler, sampler.told)
    text, neutral = texts.of(step.prompt, step.named, scale)[0], texts.neutral().guided(scale)
    latents = partial.walk(sampler, student, text, neutral, sampler.steps - 1 - moment, rng)
    return Erasing(latents, text, neutral, np.float32(eta))


def features(
    sampler: Sampler, student: Params, texts: Texts, others: Sequence[str], rng: np.random.Generator
) -> jax.Array:
    """`feature` of each of N texts, [N, L], at one random step of its own sample. All samples start from one noise."""
    done, noise = int(rng.integers(sampler.steps)), int(rng.integers(2**32))
    times = np.full(1, sampler.tables.timesteps[done], np.float32)
    found = []
    for other in others:
        text, watched = texts.of(other, other, told(sampler, sampler.told))
        latents = partial.walk(sampler, student, text, texts.neutral(), done, np.random.default_rng(noise))
        found.append(_feature_of(sampler.denoiser, student, latents, times, text, watched))
    return jnp.stack(found)


@functools.partial(jax.jit, static_argnums=0)
def _feature_of(denoiser: Denoiser, weights: Params, latents, times, text: Condition, watched) -> jax.Array:
    return feature(flux.predict_and_attend(denoiser.definition.bind(weights), latents, times, text)[1], watched)


METHOD = Method("eraseanything", "EraseAnything", align, backbones=("flux",), data_options=("pictures",))
