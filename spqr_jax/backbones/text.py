"""Text states of CLIP and T5 encoders. Each distinct text is encoded once."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax.params import Definition, Params
from spqr_jax.pipeline import Pipeline, tokenize

BATCH = 64  # texts encoded at once
T5_BATCH = 8  # at most; scores of T5-XXL take 64 MiB a text of 512 tokens


class TextStates(NamedTuple):
    """States of N texts: hidden [N, L, E]; embeds [N, P], the pooled state, projected if the encoder has a projection.

    Without a projection it is None, unless `encode` was asked for it.
    """

    hidden: jax.Array
    embeds: jax.Array | None


def _encode(definition: Definition, params: Params, ids: jax.Array, penultimate: bool, pooled: bool = False):
    out = definition.bind(params)(ids)
    states = out.hidden_states[-2] if penultimate else out.last_hidden_state
    return states, out.pooled if pooled and out.text_embeds is None else out.text_embeds


# (definition, weights, token ids [B, L], penultimate, pooled) -> states, pooled; compiled.
encode_ids = jax.jit(_encode, static_argnums=(0, 3, 4))


def encode(
    pipeline: Pipeline,
    texts: Sequence[str],
    *,
    encoder: str = "text_encoder",
    penultimate: bool = False,
    pooled: bool = False,
    length: int | None = None,
    batch_size: int = BATCH,
) -> TextStates:
    """States of texts under one of the pipeline's encoders: its last hidden states, or the penultimate ones.

    At most `batch_size` texts are encoded at once. Fewer texts are padded to the next power of two, at least 8. length:
    tokens of a text, for an encoder of any length (T5). pooled: give the pooled state of an encoder without projection.
    """
    distinct = list(dict.fromkeys(texts))
    where = {text: i for i, text in enumerate(distinct)}
    index = np.array([where[text] for text in texts])
    batch_size = min(batch_size if length is None else T5_BATCH, max(8, 1 << (len(distinct) - 1).bit_length()))
    ids = tokenize(pipeline, distinct, encoder.replace("text_encoder", "tokenizer"), length=length)
    hidden: list[jax.Array] = []
    embeds: list[Any] = []
    for start in range(0, len(ids), batch_size):
        chunk = ids[start : start + batch_size]
        padded = np.concatenate([chunk, np.repeat(chunk[-1:], batch_size - len(chunk), axis=0)])
        model = pipeline.definitions[encoder], pipeline.params[encoder]
        states, ends = encode_ids(*model, padded, penultimate, pooled)
        hidden.append(states[: len(chunk)])
        embeds.append(None if ends is None else ends[: len(chunk)])
    gathered = None if embeds[0] is None else jnp.concatenate(embeds)[index]
    return TextStates(jnp.concatenate(hidden)[index], gathered)
