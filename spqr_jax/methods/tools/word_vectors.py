"""Embedding attacks: word vectors, learned with all weights frozen, that bring an erased concept back."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax import backbones
from spqr_jax import params as params_lib
from spqr_jax import pipeline as pipeline_lib
from spqr_jax.backbones import Condition, Denoiser
from spqr_jax.backbones.models.clip_text import TextOutput
from spqr_jax.methods.tools import loop
from spqr_jax.methods.tools.loop import Adam
from spqr_jax.methods.tools.pictures import Pictures
from spqr_jax.params import Definition, Params
from spqr_jax.pipeline import Pipeline
from spqr_jax.training.objective import denoising_loss
from spqr_jax.training.words import WORDS as WORD_TABLE


class Slots(NamedTuple):
    """Token ids int32 [B, L] and where in each row free word vectors stand, int32 [B, k]."""

    ids: np.ndarray
    places: np.ndarray


def word_table(text_encoder: Params) -> jax.Array:
    """The token embedding table [V, C]."""
    return params_lib.flatten(text_encoder)[WORD_TABLE]


def word_vector(pipeline: Pipeline, word: str, name: str) -> np.ndarray:
    """The token embedding [C] of a word, the mean of its tokens'. Raises ValueError naming the option for no tokens."""
    ids = pipeline.tokenizers["tokenizer"](word, add_special_tokens=False).input_ids
    if not ids:
        raise ValueError(f"{name} {word!r} has no tokens; use a word the tokenizer knows.")
    return np.asarray(word_table(pipeline.params["text_encoder"]))[ids].mean(0)


def prefixed(pipeline: Pipeline, texts: Sequence[str], prefix: int) -> Slots:
    """Texts with `prefix` slots after the start token, the padding shortened by as many (AdvUnlearn's "prefix_k")."""
    ids = pipeline_lib.tokenize(pipeline, list(texts))
    length = ids.shape[1]
    if not 1 <= prefix < length - 2:
        raise ValueError(f"prefix={prefix} does not fit between the start and end of {length} tokens.")
    slots = np.repeat(ids[:, 1:2], prefix, axis=1)
    places = np.tile(np.arange(1, prefix + 1, dtype=np.int32), (len(ids), 1))
    return Slots(np.concatenate([ids[:, :1], slots, ids[:, 1 : length - prefix]], axis=1), places)


def framed(pipeline: Pipeline, templates: Sequence[str]) -> Slots:
    """Templates with {} read as one slot each, k of them in every template.

    CLIP's tokenizer splits at spaces first, so that what stands on either side of a slot is read on its own.
    """
    return between(pipeline, [template.split("{}") for template in templates])


def between(pipeline: Pipeline, pieces: Sequence[Sequence[str]]) -> Slots:
    """Texts of k + 1 pieces each with a slot between any two of them. A piece may be empty.

    Raises ValueError if a slot does not fit between the start and the end of a text.
    """
    tokenizer = pipeline.tokenizers["tokenizer"]
    texts = [[" , ".join(text[: k + 1]) for k in range(len(text))] for text in pieces]
    before = [[len(tokenizer(part, add_special_tokens=False).input_ids) for part in parts[:-1]] for parts in texts]
    stand_in = pipeline_lib.tokenize(pipeline, [parts[-1] for parts in texts])
    places = np.array([[1 + length for length in lengths] for lengths in before], np.int32)
    if places.max() >= stand_in.shape[1] - 1:
        raise ValueError(f"templates leave no room for a word within {stand_in.shape[1]} tokens; shorten them.")
    return Slots(stand_in, places)


def encode(definition: Definition, text_encoder: Params, ids: jax.Array, places: jax.Array, vectors: jax.Array):
    """Text states [B, L, E] with word vectors [B, k, C] in the slots of token ids [B, L]."""
    return read(definition, text_encoder, ids, places, vectors).last_hidden_state


def read(definition: Definition, text_encoder: Params, ids, places, vectors) -> TextOutput:
    """As `encode`, all that the text encoder says."""
    words = word_table(text_encoder)[ids]
    words = words.at[jnp.arange(len(ids))[:, None], places].set(vectors)
    return definition.bind(text_encoder)(ids, inputs_embeds=words)


encode_jit = jax.jit(encode, static_argnums=0)


class Static(NamedTuple):
    """What an attack step is compiled for."""

    denoiser: Denoiser
    text_encoder: Definition
    sign: bool = False


def static_of(pipeline: Pipeline, *, sign: bool = False) -> Static:
    """What attacks on this pipeline are compiled for."""
    return Static(backbones.denoiser(pipeline), pipeline.definitions["text_encoder"], sign)


# --- textual inversion (STEREO) --------------------------------------------------------------------------------------


def inversion_loss(static: Static, params: Params, weights, text_encoder, schedule, batch, ids, places, owner, key):
    """Denoising loss on images captioned with the vectors; params: {"vectors": [J, C]}, owner [B] says whose."""
    vectors = params["vectors"][owner][:, None]
    context = encode(static.text_encoder, text_encoder, ids, places, vectors)
    drawn = static.denoiser.draw(key, batch["mean"], batch["std"], schedule)
    return denoising_loss(static.denoiser, static.denoiser.bind(weights), Condition(context), drawn, schedule)


_INVERSION = loop.descent(inversion_loss)


def invert(
    name: str,
    pipeline: Pipeline,
    weights: Params,
    pictures: Pictures,
    rows: Iterator[np.ndarray],
    owners: int,
    templates: Sequence[str],
    start: np.ndarray,
    *,
    adam: Adam,
    steps: int,
    seed: int,
    frames: np.ndarray | None = None,
    progress: bool = False,
) -> np.ndarray:
    """One word vector [owners, C] for each of `owners` concepts, with which a denoiser of these weights draws them.

    Image n belongs to concept pictures.prompt[n] % owners; each step takes a batch of `rows`, frames its concepts'
    vectors in random templates, and lowers the denoising loss. start: [C]. frames: int [N], the template of each
    image, in place of random ones.
    """
    slots, schedule, base = framed(pipeline, templates), backbones.schedule(pipeline), jax.random.key(seed)
    frozen = weights, pipeline.params["text_encoder"]

    def inputs(i: int, params: Params, *frozen: Params):
        del params, frozen
        chosen = next(rows)
        drawn = np.random.default_rng((seed, i)).integers(len(templates), size=len(chosen))
        frame = drawn if frames is None else frames[chosen]
        batch = {"mean": pictures.mean[chosen], "std": pictures.std[chosen]}
        owner = pictures.prompt[chosen] % owners
        key = jax.random.fold_in(base, i)
        return schedule, batch, slots.ids[frame], slots.places[frame], owner, key

    static = static_of(pipeline)
    vectors = {"vectors": jnp.tile(jnp.asarray(start)[None], (owners, 1))}
    tuned = loop.fit(name, _INVERSION, static, adam, vectors, inputs, steps, frozen=frozen, progress=progress)
    return np.asarray(tuned["vectors"])


# --- soft prefix (AdvUnlearn) ----------------------------------------------------------------------------------------


def prefix_loss(static: Static, params: Params, weights, text_encoder, latents, t, ids, places, context):
    """MSE of the prediction under the prefixed text, by the trained encoder, and the original one under the concept's
    own states `context` [B, L, E]; params: {"prefix": [B, k, C]}."""
    wanted = jax.lax.stop_gradient(static.denoiser.bind(weights)(latents, t, Condition(context)))
    context = encode(static.text_encoder, text_encoder, ids, places, params["prefix"])
    found = static.denoiser.bind(weights)(latents, t, Condition(context))
    return jnp.square((found - wanted).astype(jnp.float32)).mean()


def prefix_gradient(static: Static, params: Params, *inputs: Any) -> tuple[jax.Array, Params]:
    """Loss and its gradient, or the gradient's sign (the fast variant)."""
    loss, grads = jax.value_and_grad(lambda p: prefix_loss(static, p, *inputs))(params)
    return loss, jax.tree.map(jnp.sign, grads) if static.sign else grads


def find_prefix(
    static: Static,
    weights: Params,
    text_encoder: Params,
    slots: Slots,
    context: np.ndarray,
    samples: Callable[[int], tuple[jax.Array, np.ndarray]],
    start: np.ndarray,
    *,
    lr: float,
    steps: int,
) -> jax.Array:
    """A prefix [B, k, C] under which the frozen denoiser with this text encoder predicts what the concept does.

    samples(i): latents [B, h, w, C] and timesteps [B] of attack step i; start: [B, k, C].
    """

    def inputs(i: int, params: Params, *frozen: Params):
        del params, frozen
        return *samples(i), slots.ids, slots.places, context

    start_params, frozen = {"prefix": jnp.asarray(start)}, (weights, text_encoder)
    return loop.fit("attack", prefix_gradient, static, Adam(lr), start_params, inputs, steps, frozen=frozen)["prefix"]
