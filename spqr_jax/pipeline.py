"""A text-to-image pipeline: weights, and everything static beside them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax import params as params_lib
from spqr_jax.backbones import models
from spqr_jax.params import Definition, Params
from spqr_jax.sampling.attached import Attached

# The class names of a diffusers model_index.json that we have a model for.
MODEL_CLASSES = {
    "unet": models.UNet2DConditionModel,
    "vae": models.AutoencoderKL,
    "text_encoder": models.CLIPTextModel,
    "text_encoder_2": models.CLIPTextModelWithProjection,
}


class Pipeline(NamedTuple):
    """A loaded text-to-image model; a value: methods and fine-tuning return a new one.

    Attributes:
        params: component name ("unet", "vae", "text_encoder", SDXL also "text_encoder_2") -> nested dict of arrays
            under diffusers' names (see `spqr_jax.params`).
        definitions: component name -> model without weights.
        configs: component name (and "scheduler") -> the dict of its config.json.
        tokenizers: "tokenizer" (SDXL also "tokenizer_2") -> transformers CLIPTokenizer.
        name: where it came from, for messages.
        attached: what acts only when generating and stays through fine-tuning, if anything.
    """

    params: dict[str, Params]
    definitions: dict[str, Definition]
    configs: dict[str, dict[str, Any]]
    tokenizers: dict[str, Any]
    name: str = ""
    attached: Attached | None = None

    def with_params(self, **components: Params) -> "Pipeline":
        """The same pipeline with the named components' weights replaced."""
        unknown = set(components) - set(self.params)
        if unknown:
            raise ValueError(f"{self.name}: no component {sorted(unknown)} (it has {sorted(self.params)}).")
        return self._replace(params={**self.params, **components})


def define(component: str, config: dict[str, Any]) -> tuple[Definition, Params]:
    """(definition, shapes) of one component from its config; nothing is allocated."""
    import flax.nnx as nnx

    return params_lib.skeleton(lambda: MODEL_CLASSES[component](config, rngs=nnx.Rngs(0)))


def vae_scale(pipeline: Pipeline) -> int:
    """Pixels per latent along one side."""
    return 2 ** (len(pipeline.configs["vae"]["block_out_channels"]) - 1)


def scaling_factor(pipeline: Pipeline) -> float:
    """What the VAE's latents are multiplied by before they are diffused."""
    return float(pipeline.configs["vae"].get("scaling_factor", 0.18215))


def default_size(pipeline: Pipeline) -> int:
    """The side in pixels the UNet was trained at."""
    return int(pipeline.configs["unet"]["sample_size"]) * vae_scale(pipeline)


def is_sdxl(pipeline: Pipeline) -> bool:
    return "text_encoder_2" in pipeline.params


def tokenize(pipeline: Pipeline, texts: list[str], tokenizer: str = "tokenizer") -> np.ndarray:
    """Texts -> int32 ids [B, L], padded and truncated to the encoder's length, as diffusers does."""
    tok = pipeline.tokenizers[tokenizer]
    encoder = "text_encoder" if tokenizer == "tokenizer" else "text_encoder_2"
    length = pipeline.configs[encoder]["max_position_embeddings"]
    ids = tok(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="np").input_ids
    return ids.astype(np.int32)


def token_sets(pipeline: Pipeline, texts: Sequence[str]) -> list[set[int]]:
    """The tokens that occur in each text, without start, end and padding."""
    tokenizer = pipeline.tokenizers["tokenizer"]
    return [set(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]


class TextStates(NamedTuple):
    """context [B, L, E] for cross-attention; pooled [B, P] for SDXL's added embedding, else None."""

    context: jax.Array
    pooled: jax.Array | None


def _encode(definition: Definition, params: Params, ids: jax.Array, penultimate: bool):
    out = definition.bind(params)(ids)
    return (out.hidden_states[-2] if penultimate else out.last_hidden_state), out.text_embeds


_encode_jit = jax.jit(_encode, static_argnums=(0, 3))


def encode_prompts(pipeline: Pipeline, texts: list[str], *, batch_size: int = 64) -> TextStates:
    """Text states of prompts, each distinct text encoded once.

    Texts are encoded `batch_size` at once, or padded to the power of two from 8 that holds them all.

    SD1 and SD2 take the last hidden state after the final norm; SDXL the penultimate states of both encoders side by
    side and the second's projected pooled state (diffusers' behaviour).
    """
    distinct = list(dict.fromkeys(texts))
    where = {text: i for i, text in enumerate(distinct)}
    index = np.array([where[text] for text in texts])
    batch_size = min(batch_size, max(8, 1 << (len(distinct) - 1).bit_length()))
    xl = is_sdxl(pipeline)
    encoders = [("text_encoder", "tokenizer")] + ([("text_encoder_2", "tokenizer_2")] if xl else [])
    parts: list[jax.Array] = []
    pooled: jax.Array | None = None
    for encoder, tokenizer in encoders:
        ids = tokenize(pipeline, distinct, tokenizer)
        states: list[tuple[jax.Array, Any]] = []
        for start in range(0, len(ids), batch_size):
            chunk = ids[start : start + batch_size]
            padded = np.concatenate([chunk, np.repeat(chunk[-1:], batch_size - len(chunk), axis=0)])
            state, embeds = _encode_jit(pipeline.definitions[encoder], pipeline.params[encoder], padded, xl)
            states.append((state[: len(chunk)], None if embeds is None else embeds[: len(chunk)]))
        parts.append(jnp.concatenate([s for s, _ in states])[index])
        if encoder == "text_encoder_2":
            pooled = jnp.concatenate([e for _, e in states])[index]
    return TextStates(jnp.concatenate(parts, axis=-1), pooled)
