"""A pipeline drawn with NumPy, for tests that need no reference: a real UNet between stand-ins for the text encoder and
the VAE, or stand-ins for all three."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from spqr_jax import backbones
from spqr_jax.data import Dataset, from_arrays
from spqr_jax.pipeline import Pipeline
from tests import stand_in

WORDS, LENGTH, WIDTH = 64, 8, 64
UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "in_channels": 4,
    "out_channels": 4,
}
SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def _draw(shapes: Any, rng: np.random.Generator) -> Any:
    """Weights about the size of trained ones: 1 + noise for scales, noise by the number of inputs for the others."""
    if isinstance(shapes, dict):
        return {name: _draw(shape, rng) for name, shape in shapes.items()}
    noise = rng.standard_normal(shapes.shape).astype(np.float32)
    return noise / np.sqrt(np.prod(shapes.shape[:-1])).astype(np.float32) if len(shapes.shape) > 1 else 1 + noise / 10


def tokenizer(texts: list[str], *, max_length: int, **_: Any) -> SimpleNamespace:
    ids = [[ord(text[i % len(text)]) * (i + 1) % WORDS if text else 0 for i in range(max_length)] for text in texts]
    return SimpleNamespace(input_ids=np.array(ids))


def pipeline(*, real: bool = True) -> Pipeline:
    """real: with a real UNet (1.3 M parameters); else with a function of a few that compiles at once."""
    rng = np.random.default_rng(0)
    if real:
        definition, shapes = backbones.define("unet", UNET)
        unet = _draw(shapes, rng)
    else:
        definition, unet = stand_in.UNet(), {"conv_in": {"kernel": rng.standard_normal((64, 64)).astype(np.float32)}}
    words = rng.standard_normal((WORDS, WIDTH)).astype(np.float32) * np.float32(1 if real else 0.003)
    text = {"text_model": {"embeddings": {"token_embedding": {"embedding": words}}}}
    return Pipeline(
        {"unet": unet, "vae": {}, "text_encoder": text},
        {"unet": definition, "vae": stand_in.Codec(), "text_encoder": stand_in.TextEncoder()},
        {
            "unet": UNET,
            "vae": {"block_out_channels": (1, 1)},
            "text_encoder": {"max_position_embeddings": LENGTH},
            "scheduler": SCHEDULER,
        },
        {"tokenizer": tokenizer},
        "tiny",
    )


def dataset(count: int = 16) -> Dataset:
    """Pictures of noise, of the size the UNet was made for."""
    images = np.random.default_rng(1).integers(0, 256, (count, 16, 16, 3), np.uint8)
    return from_arrays(images, [f"caption {i}" for i in range(count)])
