"""FMN, Forget-Me-Not (Zhang et al., 2023): shrink cross-attention to the concept's tokens on images of it."""

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax import backbones
from spqr_jax import params as params_lib
from spqr_jax.backbones import Condition, Denoiser
from spqr_jax.concepts import Concept
from spqr_jax.methods.base import Method
from spqr_jax.methods.tools import attention_maps, loop, parts, word_vectors
from spqr_jax.methods.tools import pictures as pictures_lib
from spqr_jax.methods.tools.concepts import completed
from spqr_jax.methods.tools.loop import Adam
from spqr_jax.methods.tools.pictures import Pictures
from spqr_jax.params import Params
from spqr_jax.pipeline import Pipeline

TEMPLATE = "a photo of {}"
# Standard deviation of an inverted word's first values, that of CLIP's word vectors.
WORD_STDDEV = 0.017


def align(
    pipeline: Pipeline,
    concept: Concept,
    *,
    seed: int = 0,
    images: int = 8,
    steps: int = 35,
    lr: float = 2e-6,
    train: str = "full",
    pooler: bool = True,
    inversion_steps: int = 0,
    inversion_lr: float = 1e-3,
    pictures: str = "",
    sampling_steps: int = 50,
    sampling_guidance: float = 7.5,
    progress: bool = False,
) -> Pipeline:
    """Attention resteering: minimise the norm of the attention that a noised image pays to the concept's tokens.

    Args:
        images: how many of each text, made by the base model from the concept's first template ("a photo of {}").
        pictures: a data source used instead (`pictures_lib.read`); its captions say which text an image shows.
        train: "full", the whole UNet, or "xattn", every attn2 parameter; the text encoder is frozen.
        pooler: watch the end-of-text tokens too, which in SD1.x include all padding and then outweigh the concept's.
        inversion_steps: 0, or (the authors: 500) first learn a word for each text's images by textual inversion, and
            resteer attention to that instead of to the concept's name. The authors learn four vectors, here one.
        inversion_lr: learning rate of the inversion.

    The authors publish no settings for nudity; these are their example's (a face in SD2.1), AdamW with decay 0.01,
    gradients clipped to norm 1, batches of one. There is neither a noise nor a prior loss: few steps, or everything
    goes. Little erasure is expected of this method. Several texts take turns. Raises ValueError for SDXL.
    """
    METHOD.check_backbone(pipeline)
    loop.check_at_least("FMN", images=(images, 1), inversion_steps=(inversion_steps, 0))
    if train not in ("full", "xattn"):
        raise ValueError(f'FMN: train must be "full" or "xattn", found {train!r}.')
    full = completed(concept._replace(templates=concept.templates or (TEMPLATE,)), pipeline)
    prompts = [full.templates[0].format(text) for text in full.erase]
    named = zip(prompts, full.erase, strict=True)
    watched = np.stack([attention_maps.positions(pipeline, prompt, text, end=pooler) for prompt, text in named])
    shown = pictures_lib.make(
        pipeline,
        prompts,
        images * len(prompts),
        seed=seed,
        given=pictures,
        texts=full.erase,
        name="FMN",
        steps=sampling_steps,
        guidance=sampling_guidance,
    )
    if inversion_steps:
        adam = Adam(inversion_lr, weight_decay=0.01)
        shown, watched = inverted(pipeline, shown, full.templates[0], adam, inversion_steps, seed, pooler, progress)
    tuned = _resteer(f"FMN {full.name}", pipeline, shown, watched, train, lr, steps, seed, progress)
    return backbones.of(pipeline).with_weights(pipeline, tuned)


def resteering_loss(maps: list[jax.Array], watched: jax.Array) -> jax.Array:
    """The 2-norm of all layers' attention [B, heads, queries, L] to watched tokens, bool [B, L]: one norm for all."""
    return jnp.sqrt(sum(jnp.square(jnp.where(watched[:, None, None], layer, 0)).sum() for layer in maps))


def loss(denoiser: Denoiser, trained: Params, rest: Params, schedule, batch, watched, key) -> jax.Array:
    """The resteering loss at an image noised to a random timestep."""
    drawn = denoiser.draw(key, batch["mean"], batch["std"], schedule)
    weights, noisy = params_lib.merge(rest, trained), denoiser.mix(schedule, drawn)
    maps = attention_maps.cross_attention(denoiser, weights, noisy, drawn.times, batch["condition"])
    return resteering_loss(maps, watched)


# What `align` trains with; compiled programs are kept by it.
GRADIENT = loop.descent(loss)


def _resteer(name, pipeline, pictures: Pictures, watched, train: str, lr: float, steps: int, seed: int, progress: bool):
    backbone = backbones.of(pipeline)
    weights = backbone.weights(pipeline)
    mask = parts.everything(weights) if train == "full" else parts.trained(backbone, weights, "esd-x", "FMN")
    chosen, rest = params_lib.partition(weights, mask)
    schedule, base = backbones.schedule(pipeline), jax.random.key(seed)
    order = list(pictures_lib.rows(pictures, 1, steps, seed))

    def inputs(i: int, params: Params, rest: Params):
        del params, rest
        key = jax.random.fold_in(base, i)
        return schedule, pictures.batch(order[i]), watched[pictures.prompt[order[i]]], key

    adam = Adam(lr, weight_decay=0.01, clip=1.0)
    denoiser, frozen = backbones.denoiser(pipeline), (rest,)
    tuned = loop.fit(name, GRADIENT, denoiser, adam, chosen, inputs, steps, frozen=frozen, progress=progress)
    return loop.on_host(params_lib.merge(weights, tuned))


def inverted(
    pipeline: Pipeline,
    pictures: Pictures,
    template: str,
    adam: Adam,
    steps: int,
    seed: int,
    pooler: bool,
    progress: bool,
) -> tuple[Pictures, np.ndarray]:
    """The images captioned with a learned word each, and which tokens to watch in those captions, bool [P, L]."""
    weights = backbones.of(pipeline).weights(pipeline)
    owners = len(pictures.condition.context)
    width = word_vectors.word_table(pipeline.params["text_encoder"]).shape[1]
    start = np.random.default_rng(seed).normal(0, WORD_STDDEV, width).astype(np.float32)
    rows = pictures_lib.rows(pictures, 1, steps, seed)
    vectors = word_vectors.invert(
        "FMN inversion",
        pipeline,
        weights,
        pictures,
        rows,
        owners,
        [template],
        start,
        adam=adam,
        steps=steps,
        seed=seed,
        progress=progress,
    )
    slots = word_vectors.framed(pipeline, [template] * owners)
    encoder = pipeline.definitions["text_encoder"], pipeline.params["text_encoder"]
    context = np.asarray(word_vectors.encode_jit(*encoder, slots.ids, slots.places, vectors[:, None]))
    watched = np.arange(slots.ids.shape[1]) == slots.places
    if pooler:
        watched |= slots.ids == pipeline.tokenizers["tokenizer"].eos_token_id
    return Pictures(pictures.mean, pictures.std, pictures.prompt, Condition(context)), watched


METHOD = Method("fmn", "FMN", align, backbones=("sd",), data_options=("pictures",))
