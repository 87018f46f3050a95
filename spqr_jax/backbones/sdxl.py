"""Stable Diffusion XL: a UNet that reads the states of two CLIP encoders, a pooled text state, and image sizes."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax.backbones import text
from spqr_jax.backbones.base import Array, Condition, TextEncoding
from spqr_jax.backbones.stable_diffusion import STABLE_DIFFUSION, TEXT_LORA
from spqr_jax.pipeline import Pipeline


def condition(
    pipeline: Pipeline, texts: Sequence[str], size: tuple[int, int], unconditional: Sequence[int] = ()
) -> Condition:
    """Penultimate states of both encoders side by side, the second's projected pooled state, and the sizes.

    Original and target size are `size`, and the crop begins at (0, 0). An empty text in a row of `unconditional`
    becomes zeros, as in diffusers, if force_zeros_for_empty_prompt is true in the pipeline's model_index.json. In all
    other rows an empty text is encoded like any other.
    """
    first = text.encode(pipeline, texts, encoder="text_encoder", penultimate=True)
    second = text.encode(pipeline, texts, encoder="text_encoder_2", penultimate=True)
    context, pooled = jnp.concatenate([first.hidden, second.hidden], axis=-1), second.embeds
    assert pooled is not None  # SDXL's second encoder has a projection
    empty = [row for row in unconditional if not texts[row]]
    if empty and pipeline.configs.get("model_index", {}).get("force_zeros_for_empty_prompt", True):
        context, pooled = (states.at[np.array(empty)].set(0) for states in (context, pooled))
    return Condition(context, pooled, time_ids(size, len(texts)))


def states(encoders: list[Any], ids: Array) -> tuple[jax.Array, jax.Array]:
    """The text states and the pooled ones, as `condition` has them."""
    first, second = (encoder(ids[:, i]) for i, encoder in enumerate(encoders))
    return jnp.concatenate([first.hidden_states[-2], second.hidden_states[-2]], axis=-1), second.text_embeds


def time_ids(size: tuple[int, int], count: int) -> np.ndarray:
    """The sizes that the UNet reads for uncropped images of `size` (height, width) pixels: float32 [count, 6]."""
    return np.tile(np.array([*size, 0, 0, *size], np.float32), (count, 1))


def resized(condition: Condition, size: tuple[int, int]) -> Condition:
    """The same texts for images of another size."""
    return condition._replace(time_ids=time_ids(size, len(condition.context)))


def cropped(condition: Condition, geometry: np.ndarray) -> Condition:
    """The same texts and target size for images with this original size and crop, int [N, 4].

    As diffusers' train_text_to_image_sdxl.py makes `time_ids`, but in float32: half precision would round sizes.
    """
    target = np.asarray(condition.time_ids)[:, 4:]
    return condition._replace(time_ids=np.concatenate([geometry, target], axis=1, dtype=np.float32))


SDXL = STABLE_DIFFUSION._replace(
    key="sdxl",
    name="SDXL",
    pipeline_class="StableDiffusionXLPipeline",
    components=(*STABLE_DIFFUSION.components, "text_encoder_2"),
    condition=condition,
    resized=resized,
    cropped=cropped,
    text=TextEncoding(("text_encoder", "text_encoder_2"), TEXT_LORA, states),
)
