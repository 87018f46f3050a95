"""Prompts as a search over the vocabulary sees them: the tokens it may use, and the text that a choice of them is."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax.methods.tools import word_vectors
from spqr_jax.methods.tools.word_vectors import Slots
from spqr_jax.pipeline import Pipeline


class Vocabulary(NamedTuple):
    """The S tokens that a search may use.

    Every one is a word of its own: as text it is read as this token again, whatever stands beside it. So a prompt of
    them is the prompt that was found. The authors' searches use all tokens, and their texts are read as other ones.

    Attributes:
        ids: int32 [S].
        words: their texts.
        vectors: their rows of the token table, float32 [S, C], on the device.
    """

    ids: np.ndarray
    words: tuple[str, ...]
    vectors: jax.Array


def vocabulary(pipeline: Pipeline, forbidden: Iterable[str] = ()) -> Vocabulary:
    """The tokens of a pipeline that are words of their own, but for forbidden ones.

    A token is forbidden if its text is one of `forbidden`, or holds one of four letters or more. Raises ValueError if
    none is left.
    """
    tokenizer, table = pipeline.tokenizers["tokenizer"], word_vectors.word_table(pipeline.params["text_encoder"])
    ids = np.arange(min(len(tokenizer), len(table)), dtype=np.int32)
    words = [text.strip() for text in tokenizer.batch_decode(ids[:, None])]
    again = tokenizer([f"{word} {word}" for word in words], add_special_tokens=False).input_ids
    special, banned = set(tokenizer.all_special_ids), {one.lower() for one in forbidden}
    parts = [one for one in banned if len(one) >= 4]
    kept = [
        i
        for i, word in zip(ids.tolist(), words, strict=True)
        if again[i] == [i, i] and i not in special and word not in banned and not any(part in word for part in parts)
    ]
    if not kept:
        raise ValueError(f"{pipeline.name or 'the pipeline'}: no token of its vocabulary may be used in a prompt.")
    vectors = jnp.asarray(np.asarray(table, np.float32)[kept])
    return Vocabulary(np.array(kept, np.int32), tuple(words[i] for i in kept), vectors)


def before(pipeline: Pipeline, prompt: str, count: int) -> Slots:
    """Token ids [1, L] of a prompt behind `count` slots. With prompt "" they are all of it.

    Raises ValueError if they do not fit.
    """
    try:
        return word_vectors.between(pipeline, [[""] * count + [prompt]])
    except ValueError:
        length = pipeline.configs["text_encoder"]["max_position_embeddings"]
        raise ValueError(f"{count} words to search for do not fit into a text of {length} tokens.") from None


def text(words: Vocabulary, chosen: Sequence[int] | np.ndarray, prompt: str) -> str:
    """The prompt behind the chosen words, numbers in 0..S-1."""
    return " ".join([*(words.words[number] for number in chosen), *prompt.split()])
