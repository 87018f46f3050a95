"""STEREO (Srivatsan et al., CVPR 2025): search thoroughly for ways back to the concept, then erase them all at once."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax import backbones, data
from spqr_jax import params as params_lib
from spqr_jax.backbones import Backbone, Condition, Denoiser
from spqr_jax.backbones.base import Predict
from spqr_jax.concepts import Concept
from spqr_jax.methods.base import Method
from spqr_jax.methods.tools import loop, word_vectors
from spqr_jax.methods.tools import pictures as pictures_lib
from spqr_jax.methods.tools.concepts import completed
from spqr_jax.methods.tools.loop import Adam
from spqr_jax.methods.tools.negative_guidance import erasing_loss
from spqr_jax.params import Params
from spqr_jax.pipeline import Pipeline
from spqr_jax.sampling import partial
from spqr_jax.sampling.partial import Sampler


class Erasure(NamedTuple):
    """What both stages erase with: lengths and rates of the UNet's training."""

    pipeline: Pipeline
    sampler: Sampler
    empty: Condition  # one row
    batch_size: int
    seed: int
    progress: bool


def trained(backbone: Backbone, weights: Params) -> Params:
    """Kernels and biases of every linear and convolutional layer outside cross-attention (the authors' `noxattn`); no
    norms."""
    cross = backbone.require("cross_attention", "STEREO")
    kernels = {path.removesuffix("kernel") for path in params_lib.flatten(weights) if path.endswith(".kernel")}

    def flag(path: str, _) -> bool:
        return not cross.search(path) and path.rpartition(".")[0] + "." in kernels

    return params_lib.map_with_path(flag, weights)


def align(
    pipeline: Pipeline,
    concept: Concept,
    *,
    seed: int = 42,
    rounds: int = 2,
    erase_steps: int = 200,
    erase_lr: float = 5e-6,
    erase_scale: float = 2.0,
    attack_steps: int = 3000,
    attack_lr: float = 5e-3,
    final_steps: int = 200,
    final_lr: float = 2e-5,
    final_scale: float = 2.0,
    images: int = 500,
    batch_size: int = 1,
    attack_batch_size: int = 1,
    weight_decay: float = 0.01,
    start_word: str = "person",
    pictures: str = "",
    sampling_steps: int = 50,
    sampling_guidance: float = 3.0,
    image_steps: int = 50,
    image_guidance: float = 7.5,
    progress: bool = False,
) -> Pipeline:
    """Two stages. First, `rounds` times: erase the concept (later: the word found last) from a copy of the UNet, and
    find by textual inversion a word that revives it there. Then, from the original UNet, erase the concept and all
    words at once, towards the anchors.

    Round, s = `erase_scale`: MSE(eps(z, c), ref(c) - (s - 1)(ref(c) - ref(""))), ref the UNet at the round's start.
    Final, g = `final_scale`: MSE(eps(z, m), e0("") + (g - 1)(e0(a) - e0("")) - (g + 1) mean_n (e0(n) - e0(""))), e0 the
    original, a an anchor, n the concept and the words found, m each of them in turn. z: the current UNet's guided
    DDIM sample after i ~ U{1..steps - 2} steps, at that step's timestep (the code says one step noisier).

    A round takes `erase_steps` at `erase_lr` to erase and `attack_steps` at `attack_lr` to find a word, which starts
    from the vector of `start_word`; the last stage takes `final_steps` at `final_lr`. batch_size is that of erasing,
    attack_batch_size that of the search, weight_decay holds for all. Images of the concept are made in `image_steps`
    at `image_guidance`.

    Defaults are the authors' for nudity (README: two rounds, two words; the script's own defaults are four). Several
    texts in `erase` get a word each, learned together on their own images, and every sample draws one of the texts.
    Images are encoded once, so they are not flipped at random as in the code; `pictures` names a data source used
    instead, whose captions say which text an image shows (`pictures_lib.read`). Deployed with the original text
    encoder. Raises ValueError for SDXL, a concept without anchors, and fewer `images` than give every round a batch and
    every text.
    """
    METHOD.check_backbone(pipeline)
    loop.check_at_least("STEREO", rounds=(rounds, 1), batch_size=(batch_size, 1))
    loop.check_at_least("STEREO", sampling_steps=(sampling_steps, 3), attack_batch_size=(attack_batch_size, 1))
    full = completed(concept, pipeline, "anchors")
    start = word_vectors.word_vector(pipeline, start_word, "start_word")
    turns = -(-attack_batch_size // len(full.erase))
    word_vectors.framed(pipeline, full.templates)  # raises before the images are made
    gallery = pictures_lib.make(
        pipeline,
        full.prompts,
        images,
        seed=seed,
        given=pictures,
        texts=full.erase,
        least=rounds * turns * len(full.erase),  # a round's batch, and every text in every round
        name="STEREO",
        steps=image_steps,
        guidance=image_guidance,
    )
    said = backbones.condition(pipeline, [*full.erase, ""])
    sampler = partial.sampler(pipeline, sampling_steps, sampling_guidance)
    erasure = Erasure(pipeline, sampler, said.rows(slice(-1, None)), batch_size, seed, progress)
    backbone = backbones.of(pipeline)
    erased, found = backbone.weights(pipeline), [np.asarray(said.context)[:-1]]
    for k in range(rounds):
        erased = _erase(erasure, erased, found[-1], erase_scale, Adam(erase_lr, weight_decay), erase_steps, k)
        vectors = word_vectors.invert(
            f"STEREO attack {k + 1}",
            pipeline,
            erased,
            gallery,
            gallery_rows(len(gallery), len(full.erase), k, rounds, attack_batch_size, attack_steps, seed),
            len(full.erase),
            full.templates,
            start,
            adam=Adam(attack_lr, weight_decay),
            steps=attack_steps,
            seed=seed + k,
            progress=progress,
        )
        found.append(_word_states(pipeline, vectors))
    anchors = backbones.condition(pipeline, full.anchors)
    adam = Adam(final_lr, weight_decay)
    weights = _erase_all(erasure, np.stack(found), anchors, final_scale, adam, final_steps)
    return backbone.with_weights(pipeline, loop.on_host(weights))


def compositional_target(frozen: Predict, latents, t, empty: Condition, anchor: Condition, negatives, scale):
    """The final stage's target [B, h, w, C]: empty and anchor B rows each, negatives text states [N, B, L, E]."""
    without = frozen(latents, t, empty)
    away = jnp.mean(jnp.stack([frozen(latents, t, Condition(one)) for one in negatives]), axis=0) - without
    return without + (scale - 1) * (frozen(latents, t, anchor) - without) - (scale + 1) * away


def erase_loss(denoiser: Denoiser, params: Params, rest, reference, latents, t, text, empty, eta):
    """A round's loss, that of ESD: params are trained, `reference` the weights at the round's start."""
    student = denoiser.bind(params_lib.merge(rest, params))
    return erasing_loss(student, denoiser.bind(reference), latents, t, text, empty, eta)


def final_loss(denoiser: Denoiser, params: Params, rest, frozen, latents, t, text, empty, anchor, negatives, g):
    """The final stage's loss: the distance of the weights in training from `compositional_target`."""
    target = compositional_target(denoiser.bind(frozen), latents, t, empty, anchor, negatives, g)
    student = denoiser.bind(params_lib.merge(rest, params))
    return jnp.square(student(latents, t, text) - jax.lax.stop_gradient(target)).mean()


_ERASE, _FINAL = loop.descent(erase_loss), loop.descent(final_loss)


def _student(e: Erasure, rest: Params, params: Params, text: Condition, rng: np.random.Generator):
    """(latents, timesteps [B], "" in B rows) of the denoiser in training."""
    done = int(rng.integers(1, e.sampler.steps - 1))
    latents = partial.walk(e.sampler, params_lib.merge(rest, params), text, e.empty, done, rng)
    t = np.full(len(text.context), e.sampler.tables.timesteps[done], np.int32)
    return latents, t, e.empty.rows(np.zeros(len(text.context), int))


def _erase(e: Erasure, weights: Params, texts: np.ndarray, scale: float, adam: Adam, steps: int, number: int) -> Params:
    """The denoiser after erasing text states [J, L, E], one of them a sample."""
    train, rest = params_lib.partition(weights, trained(backbones.of(e.pipeline), weights))

    def inputs(i: int, params: Params, rest: Params, _: Params):
        rng = np.random.default_rng((e.seed, number, i))
        text = Condition(texts[rng.integers(len(texts), size=e.batch_size)])
        latents, t, empty = _student(e, rest, params, text, rng)
        # c - (s - 1)(c - "") is ESD's "" - eta (c - "") with eta = s - 2.
        return latents, t, text, empty, jnp.float32(scale - 2)

    name, denoiser, frozen = f"STEREO erase {number + 1}", e.sampler.denoiser, (rest, weights)
    tuned = loop.fit(name, _ERASE, denoiser, adam, train, inputs, steps, frozen=frozen, progress=e.progress)
    return params_lib.merge(weights, tuned)


def _erase_all(e: Erasure, found: np.ndarray, anchors: Condition, scale: float, adam: Adam, steps: int) -> Params:
    """The original denoiser after erasing all ways to each concept at once: found [N, J, L, E], anchors A rows."""
    backbone = backbones.of(e.pipeline)
    original = backbone.weights(e.pipeline)
    train, rest = params_lib.partition(original, trained(backbone, original))
    order = list(
        data.sample_order([len(anchors.context)], e.batch_size, steps, e.seed)
    )  # without replacement, then again

    def inputs(i: int, params: Params, rest: Params, _: Params):
        rng = np.random.default_rng((e.seed, len(found), i))
        texts = rng.integers(found.shape[1], size=e.batch_size)
        way = (i * e.batch_size + np.arange(e.batch_size)) % len(found)  # each equally often
        text = Condition(found[way, texts])
        latents, t, empty = _student(e, rest, params, text, rng)
        return latents, t, text, empty, anchors.rows(order[i]), found[:, texts], jnp.float32(scale)

    name, denoiser, frozen = "STEREO final", e.sampler.denoiser, (rest, original)
    tuned = loop.fit(name, _FINAL, denoiser, adam, train, inputs, steps, frozen=frozen, progress=e.progress)
    return params_lib.merge(original, tuned)


def gallery_rows(count: int, texts: int, part: int, parts: int, batch: int, steps: int, seed: int):
    """Batches from the part of `count` images that round `part` may see: every round has its own of every text."""
    own = np.flatnonzero(np.arange(count) // texts % parts == part)
    return (own[rows] for rows in data.sample_order([len(own)], batch, steps, seed + part))


def _word_states(pipeline: Pipeline, vectors: np.ndarray) -> np.ndarray:
    """Text states [J, L, E] of prompts that are one learned word [J, C] each."""
    slots = word_vectors.framed(pipeline, ["{}"] * len(vectors))
    encoder = pipeline.definitions["text_encoder"], pipeline.params["text_encoder"]
    return np.asarray(word_vectors.encode_jit(*encoder, slots.ids, slots.places, vectors[:, None]))


METHOD = Method("stereo", "STEREO", align, backbones=("sd",), data_options=("pictures",))
