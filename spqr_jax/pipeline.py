"""A text-to-image pipeline: weights, and everything else that is needed to make images with them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from spqr_jax.params import Definition, Params


class Pipeline(NamedTuple):
    """A loaded text-to-image model. It is a value: methods and fine-tuning return a new one.

    Attributes:
        params: component name ("unet", "vae", "text_encoder", SDXL also "text_encoder_2") -> nested dict of arrays
            under diffusers' names (see `spqr_jax.params`).
        definitions: component name -> model without weights.
        configs: component name (and "scheduler") -> the dict of its config.json.
        tokenizers: "tokenizer" (SDXL also "tokenizer_2", SD3 "tokenizer_3") -> CLIPTokenizer or T5Tokenizer.
        name: its origin, for messages.
        attached: attachments, which act only while images are made and stay through fine-tuning
            (`spqr_jax.sampling.attached`).
        text_length: tokens of a text for a T5 encoder; None: the default of the backbone. CLIP's length is fixed.
    """

    params: dict[str, Params]
    definitions: dict[str, Definition]
    configs: dict[str, dict[str, Any]]
    tokenizers: dict[str, Any]
    name: str = ""
    attached: tuple[Any, ...] = ()
    text_length: int | None = None

    def with_params(self, **components: Params) -> "Pipeline":
        """The same pipeline with the named components' weights replaced."""
        unknown = set(components) - set(self.params)
        if unknown:
            raise ValueError(f"{self.name}: no component {sorted(unknown)} (it has {sorted(self.params)}).")
        return self._replace(params={**self.params, **components})


def tokenize(
    pipeline: Pipeline, texts: list[str], tokenizer: str = "tokenizer", *, length: int | None = None
) -> np.ndarray:
    """Texts -> int32 token ids [B, L], padded and truncated to the length of the encoder, as in diffusers.

    length: L for an encoder of any length (T5).
    """
    tok = pipeline.tokenizers[tokenizer]
    if length is None:
        length = pipeline.configs[tokenizer.replace("tokenizer", "text_encoder")]["max_position_embeddings"]
    ids = tok(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="np").input_ids
    return ids.astype(np.int32)


def token_sets(pipeline: Pipeline, texts: Sequence[str]) -> list[set[int]]:
    """The tokens that occur in each text, without start, end and padding."""
    tokenizer = pipeline.tokenizers["tokenizer"]
    return [set(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
