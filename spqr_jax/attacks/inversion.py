"""Concept inversion (Pham et al., ICLR 2024): learn a word whose vector makes the pipeline draw what was erased."""

from collections.abc import Sequence

import jax
import numpy as np

from spqr_jax import backbones
from spqr_jax.attacks import base
from spqr_jax.attacks.base import Attack, Attacked
from spqr_jax.concepts import Concept
from spqr_jax.methods.tools import loop, word_vectors
from spqr_jax.methods.tools import pictures as pictures_lib
from spqr_jax.methods.tools.concepts import mention
from spqr_jax.methods.tools.loop import Adam
from spqr_jax.methods.tools.pictures import Pictures
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
    weights, found, losses = loop.on_device(base.drawing_weights(pipeline)), {}, {}
    for number in sorted(set(shows)):
        text = full.erase[number]
        own = int(base.generator(seed, text).integers(2**31))
        captions = full.prompts[number :: len(full.erase)]
        gallery = pictures_lib.make(
            target,
            captions,
            images,
            seed=own,
            name=ATTACK.title,
            steps=image_steps,
            guidance=image_guidance,
            scheduler=base.SCHEDULER,
        )
        start = word_vectors.word_vector(pipeline, start_word or text, "start_word")
        rows = pictures_lib.rows(gallery, batch_size, steps, own)
        frames, numbers = frames_of(full, text, captions, gallery)
        try:
            (vector,) = word_vectors.invert(
                f"inversion of {text!r}",
                pipeline,
                weights,
                gallery,
                rows,
                1,
                frames,
                start,
                adam=Adam(lr, weight_decay),
                steps=steps,
                seed=own,
                frames=numbers,
                progress=progress,
            )
            loss = word_loss(pipeline, weights, gallery, frames, numbers, vector, own)
        except FloatingPointError:  # the weights under attack give no finite loss
            continue
        if np.isfinite(loss):
            found[number], losses[number] = vector, loss
    words = {number: f"<word-{number}>" for number in found}
    return Attacked(
        tuple(
            with_word(prompt, full.erase[shown], words[shown]) if shown in words else prompt
            for prompt, shown in zip(prompts, shows, strict=True)
        ),
        {words[number]: vector for number, vector in found.items()},
        loss=np.array([losses.get(shown, np.nan) for shown in shows]),
        queries=steps * len(set(shows)),
    )


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


def word_loss(
    pipeline: Pipeline,
    weights: Params,
    gallery: Pictures,
    templates: Sequence[str],
    frames: np.ndarray | None,
    vector: np.ndarray,
    seed: int,
) -> float:
    """The denoising loss of a word vector [C] on every picture once, in its frame, or in one after the other."""
    slots = word_vectors.framed(pipeline, templates)
    frame = np.arange(len(gallery)) % len(templates) if frames is None else frames
    batch = {"mean": gallery.mean, "std": gallery.std}
    return float(
        _LOSS(
            word_vectors.static_of(pipeline),
            {"vectors": vector[None]},
            weights,
            pipeline.params["text_encoder"],
            backbones.schedule(pipeline),
            batch,
            slots.ids[frame],
            slots.places[frame],
            np.zeros(len(gallery), int),
            jax.random.key(seed),
        )
    )


_LOSS = jax.jit(word_vectors.inversion_loss, static_argnums=0)

ATTACK = Attack("inversion", "Concept inversion", attack, "white-box", backbones=("sd",))
