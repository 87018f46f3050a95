"""The emoji world's VAE: 32x32 images <-> 8x8x16 latents."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spqr_jax import params as params_lib
from spqr_jax.backbones import models
from spqr_jax.mini import corpus, world
from spqr_jax.params import Definition, Params
from spqr_jax.recipe import training

RECIPE = training.Recipe(steps=1000, batch=32, lr=2e-3)
DECODER_RECIPE = training.Recipe(steps=1000, batch=32, lr=1.5e-3)
DECODING = ("decoder", "post_quant_conv")
DECODER_NOISE = 0.1  # beside latents of standard deviation 1.4: about what sampling leaves
KL_WEIGHT = 1e-8  # beside an error averaged over pixels; keeps the latents bounded and nearly free of noise
FIRST_LOGVAR = -6.0  # latents start almost without noise, or the decoder learns averages first
EDGE_WEIGHT = 0.5
CONFIG: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [16, 32, 64],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 16,
    "norm_num_groups": 8,
    "sample_size": world.IMAGE,
    "scaling_factor": 1.0,  # set from the latents once trained
}


def train(workdir: Path) -> Params:
    """Both halves: reconstruction (absolute error of pixels and of their differences) plus a small KL term."""
    definition, params = params_lib.split(models.AutoencoderKL(CONFIG, rngs=nnx.Rngs(2)))
    params["quant_conv"]["bias"] = params["quant_conv"]["bias"].at[CONFIG["latent_channels"] :].set(FIRST_LOGVAR)

    def loss(params, images_u8, key):
        vae = definition.bind(params)
        x = _pm1(images_u8)
        mean, logvar = vae.encode(x)
        z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
        kl = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar).sum((1, 2, 3)).mean()
        return _difference(x, vae.decode(z)) + KL_WEIGHT * kl

    return training.train("vae", params, loss, _every_emoji, RECIPE, workdir)


def train_decoder(vae_params: Params, workdir: Path) -> Params:
    """The decoder alone, longer, on slightly noisy latents: sharper images, and the latents stay what they are, so
    this may run beside the UNet's training or after it. Returns the whole VAE."""
    definition, _ = params_lib.skeleton(lambda: models.AutoencoderKL(CONFIG, rngs=params_lib.OneKey()))
    trained, frozen = ({k: v for k, v in vae_params.items() if (k in DECODING) == part} for part in (True, False))

    def loss(params, images_u8, key):
        vae = definition.bind({**frozen, **params})
        x = _pm1(images_u8)
        mean, _ = vae.encode(x)
        z = mean + DECODER_NOISE * jax.random.normal(key, mean.shape)
        return _difference(x, vae.decode(jax.lax.stop_gradient(z)))

    return {**frozen, **training.train("decoder", trained, loss, _every_emoji, DECODER_RECIPE, workdir)}


def _every_emoji(rng: np.random.Generator) -> np.ndarray:
    """images_u8 of a batch: the generator's objects, and one image in five of any other emoji."""
    known, others = corpus.object_rows(), corpus.other_rows()
    n = RECIPE.batch
    rows = np.where(rng.random(n) < 0.2, rng.choice(others, n), rng.choice(known, n))
    styles, backgrounds = rng.integers(len(world.STYLES), size=n), rng.integers(len(world.BACKGROUNDS), size=n)
    c = corpus.Compositions(np.arange(n), styles, backgrounds, *rng.integers(world.MAX_OFFSET + 1, size=(2, n)))
    return corpus.pictures(c, rows)


def _pm1(images_u8: jax.Array) -> jax.Array:
    return images_u8.astype(jnp.float32) / 127.5 - 1


def _difference(x: jax.Array, y: jax.Array) -> jax.Array:
    edges = sum(jnp.abs(jnp.diff(x, axis=a) - jnp.diff(y, axis=a)).mean() for a in (1, 2))
    return jnp.abs(x - y).mean() + EDGE_WEIGHT * edges


def encode_all(definition: Definition, params: Params, images_u8: np.ndarray, batch: int = 256):
    """(mean, log-variance) of images, float32 [N, 8, 8, 16] each."""
    encode = jax.jit(lambda p, x: definition.bind(p).encode(_pm1(x)))
    parts = []
    for start in range(0, len(images_u8), batch):
        chunk = images_u8[start : start + batch]
        padded = np.concatenate([chunk, np.repeat(chunk[-1:], batch - len(chunk), axis=0)])
        parts.append([np.asarray(out)[: len(chunk)] for out in encode(params, padded)])
    means, logvars = zip(*parts, strict=True)
    return np.concatenate(means), np.concatenate(logvars)
