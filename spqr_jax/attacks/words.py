"""Pseudo words: words of a tokenizer's own that stand for learned vectors of the text encoder's token table."""

import copy
from collections.abc import Mapping

import numpy as np

from spqr_jax import backbones
from spqr_jax import params as params_lib
from spqr_jax.methods.tools.word_vectors import WORD_TABLE, word_table
from spqr_jax.pipeline import Pipeline

ENCODER, TOKENIZER = "text_encoder", "tokenizer"


def added(pipeline: Pipeline, words: Mapping[str, np.ndarray]) -> Pipeline:
    """The pipeline whose tokenizer and token table know the pseudo words, so that prompts may hold them.

    words: pseudo word -> its vector [C]. A word is read wherever it stands in a text, as one token. As diffusers'
    `load_textual_inversion` does it: k words are the last k rows of a table [V + k, C], which keeps its dtype. The
    given pipeline and its tokenizer stay as they are. Of old configs with eos_token_id=2, the pooled state of a text
    with a pseudo word is not that of its end (`CLIPTextModel`); Stable Diffusion does not read it.

    Raises ValueError for a backbone with other text encoders than one CLIP, for a word that is no single token of its
    own to add, and for a vector of another length or with values that are not finite.
    """
    if not words:
        return pipeline
    backbones.check_defined("A pseudo word", "kind of word", ("sd",), pipeline)
    table = np.asarray(word_table(pipeline.params[ENCODER]))
    tokenizer, rows = copy.deepcopy(pipeline.tokenizers[TOKENIZER]), []
    if len(tokenizer) != len(table):
        raise ValueError(
            f"{pipeline.name}: the tokenizer knows {len(tokenizer)} tokens, the text encoder's table has {len(table)} "
            "rows; pseudo words need as many of both."
        )
    for word, vector in words.items():
        vector = np.asarray(vector)
        if vector.shape != table.shape[1:] or not np.isfinite(vector).all():
            raise ValueError(f"pseudo word {word!r}: expected {table.shape[1]} finite numbers, found {_found(vector)}.")
        one_token = len(tokenizer(word, add_special_tokens=False).input_ids) < 2
        if word != word.strip().lower() or one_token or tokenizer.add_tokens([word]) != 1:
            raise ValueError(
                f"pseudo word {word!r} cannot be added: it is a token already, empty, or has capitals or outer spaces; "
                'choose another, as "<word-0>".'
            )
        rows.append(vector.astype(table.dtype))
    text_encoder = params_lib.merge(
        pipeline.params[ENCODER], params_lib.unflatten({WORD_TABLE: np.concatenate([table, np.stack(rows)])})
    )
    config = {**pipeline.configs[ENCODER], "vocab_size": len(table) + len(rows)}
    return pipeline.with_params(text_encoder=text_encoder)._replace(
        tokenizers={**pipeline.tokenizers, TOKENIZER: tokenizer}, configs={**pipeline.configs, ENCODER: config}
    )


def _found(vector: np.ndarray) -> str:
    return f"shape {vector.shape}" if np.isfinite(vector).all() else "some that are not"
