"""Concept inversion (Pham et al., ICLR 2024): learn a word whose vector makes the pipeline draw what was erased."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax import backbones
from spqr_jax.attacks import base, searches
from spqr_jax.attacks.base import Attack, Attacked
from spqr_jax.attacks.searches import Descent
from spqr_jax.concepts import Concept
from spqr_jax.devices import mesh as mesh_lib
from spqr_jax.methods.tools import pictures as pictures_lib
from spqr_jax.methods.tools import word_vectors
from spqr_jax.methods.tools.concepts import mention
from spqr_jax.methods.tools.loop import Adam
from spqr_jax.methods.tools.pictures import Pictures
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
    steps: int = 5000,
    lr: float = 0.08,
    batch_size: int = 16,
    images: int = 25,
    weight_decay: float = 0.01,
    start_word: str = "",
    image_steps: int = 50,
    image_guidance: float = 7.5,
    progress: bool = False,
) -> Attacked:
    """Textual inversion with all weights frozen: v = argmin E || eps(z_t, T(frame with v)) - noise ||^2 over z_0 of
    `images` pictures that `target` draws of the concept, frames of `concept.templates`, times and noise.

    Every text in `erase` that a prompt shows (`base.shown`) gets a word of its own, in `steps` steps of AdamW; the word
    takes the place of the text in the prompt, or stands before a prompt that does not name the text, as the authors'
    captions of I2P. loss: that of the found word on all its pictures, with noise and times that are the same for every
    pipeline. queries: steps.

    Defaults are those of the authors' code (train.sh of each method but SLD: batches of 4 accumulated 4 times,
    --scale_lr multiplies 5e-3 by both, 25 pictures). Their success is what people, or a classifier, see in images of
    the word. Differences: the word starts from the text's own vector (the mean of its tokens'), or from `start_word`,
    where the authors name a class by hand; pictures are encoded once, and not flipped at random; weights are float32,
    theirs half precision.
    """
    least = {"steps": (steps, 1), "batch_size": (batch_size, 1), "images": (images, batch_size)}
    full, target = base.checked(ATTACK, pipeline, prompts, concept, target, **least)
    if start_word:
        word_vectors.word_vector(pipeline, start_word, "start_word")
    word_vectors.framed(pipeline, full.templates)
    shows = base.shown(target, prompts, full.erase)
    numbers = sorted(set(shows))
    texts = [full.erase[number] for number in numbers]
    captions = [full.prompts[number :: len(full.erase)] for number in numbers]
    seeds = [int(base.generator(seed, text).integers(2**31)) for text in texts]
    pictures = base.galleries(target, captions, images, seeds, image_steps, image_guidance)
    owns, starts, most = [], [], max(len(templates) for templates in (full.templates, *captions))
    for text, said, gallery, own in zip(texts, captions, pictures, seeds, strict=True):
        rows = np.stack(list(pictures_lib.rows(gallery, batch_size, steps, own)))
        owns.append(own_of(pipeline, full, text, said, gallery, rows, own, most))
        starts.append(word_vectors.word_vector(pipeline, start_word or text, "start_word"))
    models = Models(base.drawing_weights(pipeline), pipeline.params["text_encoder"], backbones.schedule(pipeline))
    static, adam = word_vectors.static_of(pipeline), Adam(lr, weight_decay)
    descent = Descent(ATTACK.title, gradient, look, static, adam, steps, steps)
    first = {"vectors": np.stack(starts)[:, None]}
    courses = searches.along(descent, first, models, searches.stacked(owns), progress)
    good = [bool(np.isfinite(course.losses).any()) for course in courses]
    found = {number: course for number, course, yes in zip(numbers, courses, good, strict=True) if yes}
    words = {number: f"<word-{number}>" for number in found}
    return Attacked(
        tuple(
            with_word(prompt, full.erase[shown], words[shown]) if shown in words else prompt
            for prompt, shown in zip(prompts, shows, strict=True)
        ),
        {words[number]: course.candidates[-1] for number, course in found.items()},
        loss=np.array([found[shown].losses[-1] if shown in found else np.nan for shown in shows]),
        queries=steps * len(numbers),
    )


class Models(NamedTuple):
    """What the searches for all words read: the denoiser's weights, the text encoder's, abar_t [T]."""

    weights: Params
    text_encoder: Params
    schedule: jax.Array


class Own(NamedTuple):
    """What the search for one word reads.

    Attributes:
        mean, std: float32 [P, h, w, C] of its P pictures' latents.
        slots: of the F texts that frame the word, ids [F, L] and places [F, 1].
        all_frames: int [P], the frame of each picture when a word is measured.
        rows, frames: int [steps, B], the pictures of each step and their frames.
        seed: of times and noise.
    """

    mean: Any
    std: Any
    slots: Slots
    all_frames: Any
    rows: Any
    frames: Any
    seed: Any


def own_of(
    pipeline: Pipeline,
    concept: Concept,
    text: str,
    captions: Sequence[str],
    gallery: Pictures,
    rows: np.ndarray,
    seed: int,
    most: int,
) -> Own:
    """What the search for the word of a text reads, of its gallery and the rows [steps, B] of its batches.

    A picture's frame is its own caption, where all name the text. Otherwise it is one of the concept's templates, drawn
    anew for every step. most: frames of the word that has most, so that all words have as many.
    """
    templates, of_picture = frames_of(concept, text, captions, gallery)
    count = len(templates)
    if of_picture is None:
        frames = np.stack([np.random.default_rng((seed, i)).integers(count, size=len(b)) for i, b in enumerate(rows)])
        of_picture = np.arange(len(gallery)) % count
    else:
        frames = of_picture[rows]
    slots = word_vectors.framed(pipeline, templates)
    ids, places = (mesh_lib.pad_batch(leaf, most) for leaf in slots)
    return Own(gallery.mean, gallery.std, Slots(ids, places), of_picture, rows, frames, np.uint32(seed))


def frames_of(
    concept: Concept, text: str, captions: Sequence[str], gallery: Pictures
) -> tuple[Sequence[str], np.ndarray | None]:
    """(templates, which of them frames each picture [N]): the captions of the pictures, where all name the text.

    Otherwise the concept's templates, and None.
    """
    places = [mention(text).search(caption) for caption in captions]
    own = [
        caption[: at.start()] + "{}" + caption[at.end() :] for caption, at in zip(captions, places, strict=True) if at
    ]
    if len(own) < len(captions) or captions == (text,):
        return concept.templates, None
    return own, gallery.prompt


def with_word(prompt: str, text: str, word: str) -> str:
    """The prompt with a word in the place of each mention of a text, or before it all if there is none."""
    named = mention(text)
    return named.sub(word, prompt) if named.search(prompt) else f"{word} {prompt}"


def gradient(static: Static, params: Params, i: jax.Array, models: Models, own: Own) -> tuple[jax.Array, Params]:
    """Loss and gradient of params {"vectors": [1, C]} on the batch of step i."""
    key = jax.random.fold_in(jax.random.key(own.seed), i)
    return jax.value_and_grad(lambda word: loss(static, word, models, own, own.rows[i], own.frames[i], key))(params)


def look(static: Static, params: Params, models: Models, own: Own) -> tuple[jax.Array, jax.Array]:
    """(the word vector [C]; its loss on every picture once)."""
    rows = jnp.arange(len(own.mean))
    found = loss(static, params, models, own, rows, own.all_frames, jax.random.key(own.seed))
    return params["vectors"][0], found


def loss(static: Static, params: Params, models: Models, own: Own, rows, frames, key: jax.Array) -> jax.Array:
    """The denoising loss of params {"vectors": [1, C]} on pictures rows [B], in frames [B]."""
    weights, text_encoder, schedule = models
    batch, owner = {"mean": own.mean[rows], "std": own.std[rows]}, jnp.zeros(len(rows), int)
    given = weights, text_encoder, schedule, batch, own.slots.ids[frames], own.slots.places[frames], owner, key
    return word_vectors.inversion_loss(static, params, *given)


ATTACK = Attack("inversion", "Concept inversion", attack, "white-box", backbones=("sd",))
