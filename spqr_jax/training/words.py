"""Pseudo words: words of a tokenizer's own that stand for learned vectors of the text encoder's token table.

Textual inversion trains such a vector with all else frozen.
"""

import copy
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx

from spqr_jax import backbones
from spqr_jax import params as params_lib
from spqr_jax.data import Dataset
from spqr_jax.params import Definition, Params
from spqr_jax.pipeline import Pipeline
from spqr_jax.training import lora

ENCODER, TOKENIZER, TABLE = "text_encoder", "tokenizer", "text_model.embeddings.token_embedding"
WORDS = f"{TABLE}.embedding"
# Captions of pictures of a thing without a name: diffusers' examples/textual_inversion, after the paper's.
TEMPLATES = (
    *("a photo of a {}", "a rendering of a {}", "a cropped photo of the {}", "the photo of a {}"),
    *("a photo of a clean {}", "a photo of a dirty {}", "a dark photo of the {}", "a photo of my {}"),
    *("a photo of the cool {}", "a close-up photo of a {}", "a bright photo of the {}", "a cropped photo of a {}"),
    *("a photo of the {}", "a good photo of the {}", "a photo of one {}", "a close-up photo of the {}"),
    *("a rendition of the {}", "a photo of the clean {}", "a rendition of a {}", "a photo of a nice {}"),
    *("a good photo of a {}", "a photo of the nice {}", "a photo of the small {}", "a photo of the weird {}"),
    *("a photo of the large {}", "a photo of a cool {}", "a photo of a small {}"),
)


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
    table = np.asarray(params_lib.flatten(pipeline.params[ENCODER])[WORDS])
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
        pipeline.params[ENCODER], params_lib.unflatten({WORDS: np.concatenate([table, np.stack(rows)])})
    )
    config = {**pipeline.configs[ENCODER], "vocab_size": len(table) + len(rows)}
    return pipeline.with_params(text_encoder=text_encoder)._replace(
        tokenizers={**pipeline.tokenizers, TOKENIZER: tokenizer}, configs={**pipeline.configs, ENCODER: config}
    )


def _found(vector: np.ndarray) -> str:
    return f"shape {vector.shape}" if np.isfinite(vector).all() else "some that are not"


def read(pipeline: Pipeline, word: str) -> Pipeline:
    """The pipeline that reads `word` as one token, whose vector is zero. Raises as `added`."""
    width = params_lib.flatten(pipeline.params[ENCODER])[WORDS].shape[1]
    return added(pipeline, {word: np.zeros(width, np.float32)})


def attach(pipeline: Pipeline, initial: str) -> tuple[Definition, Params]:
    """The text encoder with the vector of one new word, which starts as that of the word `initial`.

    Raises ValueError unless `initial` is one token, as diffusers' script does.
    """
    (ids,) = pipeline.tokenizers[TOKENIZER]([initial], add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise ValueError(f"a new word starts as a word of one token, found {initial!r} of {len(ids)}; choose another.")
    model = pipeline.definitions[ENCODER].bind(pipeline.params[ENCODER])
    table = lora.module_at(model, TABLE)
    table.new = nnx.Param(jnp.asarray(table.embedding[...][ids[0]])[None])
    return params_lib.split(model)


def captioned(pictures: Dataset, word: str) -> Dataset:
    """The pictures under every one of TEMPLATES with the word: row r is picture r modulo their number.

    diffusers' script draws a template at random for each showing. Here a pass shows every picture under each.
    """
    count = len(pictures)
    captions = tuple(template.format(word) for template in TEMPLATES for _ in range(count))
    geometry = pictures.geometry
    return Dataset(
        captions,
        lambda rows: pictures.images(rows % count),
        f"{pictures.name} as {word}",
        None if geometry is None else lambda rows: geometry(rows % count),
    )
