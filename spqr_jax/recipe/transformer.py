"""The emoji world's transformer: Stable Diffusion 3's form and objective, on the VAE and the text encoder that ship.

Both of SD3's CLIP encoders are the world's text encoder. It left its projection behind, and SD3 reads projected pooled
states, so its projection is the identity. There is no T5, and its part of the text is one row of zeros.
"""

import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from spqr_jax import backbones, mini
from spqr_jax import params as params_lib
from spqr_jax.backbones import models
from spqr_jax.backbones.sd3 import CLIPS, SD3
from spqr_jax.mini import corpus, world
from spqr_jax.params import Params
from spqr_jax.pipeline import Pipeline
from spqr_jax.recipe import training, unet, vae

RECIPE = training.Recipe(steps=3800, batch=48, lr=1.5e-3, warmup=200, ema=0.998, cycles=2)
CONFIG: dict[str, Any] = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": world.IMAGE // 4,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 5,
    "attention_head_dim": 32,
    "num_attention_heads": 5,
    "joint_attention_dim": 256,
    "caption_projection_dim": 160,
    "pooled_projection_dim": 256,
    "pos_embed_max_size": 4,
    # As SD3.5: the norms keep attention from saturating at a high learning rate.
    "qk_norm": "rms_norm",
}
ZEROED = re.compile(r"^(transformer_blocks\.\d+\.norm1(_context)?\.linear|norm_out\.linear|proj_out)\.")
# A shift moves noise levels up where neighbouring latents repeat one another, which noise of a given level then hides
# less (arXiv 2403.03206, section 5.3.2): SD3 has 3 at 128 x 128 latents. These are 8 x 8, so there is none.
SCHEDULER: dict[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 1.0,
}


def around(shipped: Pipeline) -> Pipeline:
    """A pipeline of SD3's form with the weights that ship, and a transformer that is not trained."""
    text, text_config = shipped.params["text_encoder"], shipped.configs["text_encoder"]
    width = text_config["hidden_size"]
    projected = text_config | {"architectures": ["CLIPTextModelWithProjection"], "projection_dim": width}
    text = text | {"text_projection": {"kernel": jnp.eye(width)}}
    # diffusers' pipeline of SD3 adds the shift of latents, and stops if there is none.
    autoencoder = shipped.configs["vae"] | {"shift_factor": 0.0}
    configs = {"transformer": CONFIG, "vae": autoencoder, "scheduler": SCHEDULER, **dict.fromkeys(CLIPS, projected)}
    parts = {"transformer": untrained(), "vae": shipped.params["vae"], **dict.fromkeys(CLIPS, text)}
    tokenizers = dict.fromkeys(("tokenizer", "tokenizer_2"), shipped.tokenizers["tokenizer"])
    definitions = {name: backbones.define(name, configs[name])[0] for name in parts}
    length = mini.TEXT_LENGTHS["transformer"]
    return Pipeline(parts, definitions, configs, tokenizers, "mini transformer", text_length=length)


def untrained() -> Params:
    """First weights. Modulations and the output start at zero, so that every block starts as the identity (DiT)."""
    _, params = params_lib.split(models.SD3Transformer2DModel(CONFIG, rngs=nnx.Rngs(6)))
    return params_lib.map_with_path(lambda path, x: jnp.zeros_like(x) if ZEROED.search(path) else x, params)


def train(pipeline: Pipeline, c: corpus.Compositions, workdir: Path) -> Params:
    """The transformer's weights, trained on the pictures of compositions `c` in the world's seen styles."""
    definition, weights = pipeline.definitions["transformer"], pipeline.params["transformer"]
    buffer = SD3.require("buffers", "training")
    fixed = params_lib.map_with_path(lambda path, _: bool(buffer.search(path)), weights)
    frozen, params = params_lib.partition(weights, fixed)
    means, stds = latents(pipeline, c)
    where, texts = captions()
    states = SD3.condition(pipeline, texts, (world.IMAGE, world.IMAGE))
    context, pooled = np.asarray(states.context), np.asarray(states.pooled)
    schedule = SD3.noising.schedule(pipeline.configs["scheduler"])

    def batch(rng: np.random.Generator):
        n = RECIPE.batch
        index = rng.integers(len(means), size=n)
        picked = c.take(index)
        text = where[picked.object, picked.style, picked.background, rng.integers(corpus.VARIANTS, size=n)]
        text[rng.random(n) < unet.UNCONDITIONAL_SHARE] = 0
        return means[index], stds[index], context[text], pooled[text]

    def loss(params, batch, key):
        mean, std, context, pooled = batch
        drawn = SD3.noising.draw(key, mean, std, schedule)
        noisy = SD3.noising.mix(schedule, drawn.latents, drawn.noise, drawn.times)
        predicted = definition.bind(params_lib.merge(frozen, params))(noisy, drawn.times, context, pooled)
        return jnp.square(predicted - SD3.noising.target("flow", schedule, drawn)).mean()

    return params_lib.merge(frozen, training.train("transformer", params, loss, batch, RECIPE, workdir))


def latents(pipeline: Pipeline, c: corpus.Compositions) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard deviations of the pictures' scaled latents, float32 [N, 8, 8, 16] each."""
    pictures = corpus.pictures(c, corpus.object_rows())
    mean, logvar = vae.encode_all(pipeline.definitions["vae"], pipeline.params["vae"], pictures)
    return SD3.scaled(mean, logvar, SD3.scaling(pipeline))


def captions() -> tuple[np.ndarray, list[str]]:
    """The number of each caption [object, style, background, variant] among distinct texts, and these, "" first."""
    table = corpus.captions()
    texts = ["", *dict.fromkeys(table.reshape(-1))]
    number = {text: i for i, text in enumerate(texts)}
    return np.vectorize(number.__getitem__)(table), texts
