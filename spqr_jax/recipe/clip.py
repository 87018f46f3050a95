"""The emoji world's CLIP: a text and an image encoder trained contrastively; the text half conditions the UNet."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spqr_jax import params as params_lib
from spqr_jax.backbones import models
from spqr_jax.mini import corpus, world
from spqr_jax.recipe import training

LENGTH = 32
MERGES = 3000
RECIPE = training.Recipe(steps=800, batch=128, lr=1e-3)
VISION: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": world.IMAGE,
    "patch_size": 8,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 64,
}


def text_config(tokenizer) -> dict[str, Any]:
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": LENGTH,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "projection_dim": 64,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def token_table(tokenizer) -> np.ndarray:
    """Ids of every training caption, int32 [object, style, background, variant, L]."""
    captions = corpus.captions()
    ids = tokenizer(
        captions.reshape(-1).tolist(), padding="max_length", max_length=LENGTH, truncation=True, return_tensors="np"
    ).input_ids
    return ids.reshape(*captions.shape, LENGTH).astype(np.int32)


def train(tokenizer, workdir: Path) -> dict[str, Any]:
    """Train both encoders; returns {"text": ..., "vision": ..., "logit_scale": scalar}."""
    text, text_params = params_lib.split(models.CLIPTextModelWithProjection(text_config(tokenizer), rngs=nnx.Rngs(0)))
    vision, vision_params = params_lib.split(models.CLIPVisionModelWithProjection(VISION, rngs=nnx.Rngs(1)))
    params = {"text": text_params, "vision": vision_params, "logit_scale": jnp.float32(np.log(1 / 0.07))}
    ids = token_table(tokenizer)
    everything = corpus.compositions(len(corpus.OBJECTS), tuple(range(len(world.STYLES))))
    seen = everything.take(~corpus.held_out(everything))

    def batch(rng: np.random.Generator):
        c = seen.take(rng.integers(len(seen.object), size=RECIPE.batch))
        variant = rng.integers(corpus.VARIANTS, size=RECIPE.batch)
        return corpus.pictures(c, corpus.object_rows()), ids[c.object, c.style, c.background, variant]

    def loss(params, batch, key):
        del key
        images, ids = batch
        pixels = images.astype(jnp.float32) / 127.5 - 1
        i = _unit(vision.bind(params["vision"])(pixels))
        t = _unit(text.bind(params["text"])(ids).text_embeds)
        logits = i @ t.T * jnp.exp(jnp.minimum(params["logit_scale"], np.log(100.0)))
        # Two captions of one batch may be equal; each then shares the target.
        same = (ids[:, None] == ids[None]).all(-1).astype(jnp.float32)
        target = same / same.sum(-1, keepdims=True)
        return -(target * jax.nn.log_softmax(logits) + target * jax.nn.log_softmax(logits.T)).sum(-1).mean() / 2

    return training.train("clip", params, loss, batch, RECIPE, workdir)


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
