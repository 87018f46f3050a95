"""The emoji world's UNet: velocity prediction on cached latents under a frozen text encoder, as Stable Diffusion 2."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from spqr_jax import params as params_lib
from spqr_jax import schedulers
from spqr_jax.backbones import models
from spqr_jax.mini import corpus, world
from spqr_jax.params import Params
from spqr_jax.recipe import training

RECIPE = training.Recipe(steps=3000, batch=64, lr=1.5e-3, warmup=200, ema=0.998, cycles=2)
UNCONDITIONAL_SHARE = 0.1
CONFIG: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": world.IMAGE // 4,
    "in_channels": 16,
    "out_channels": 16,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [64, 128],
    "layers_per_block": 1,
    "cross_attention_dim": 128,
    "attention_head_dim": [2, 4],
    "norm_num_groups": 16,
    "use_linear_projection": True,
}
SCHEDULER: dict[str, Any] = {
    "_class_name": "DPMSolverMultistepScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "steps_offset": 1,
    # As in every Stable Diffusion: diffusers' defaults differ, and methods that draw with DDIM would clip the latents.
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}


def train(
    latents: tuple[np.ndarray, np.ndarray], c: corpus.Compositions, states: np.ndarray, empty: np.ndarray, workdir: Path
) -> Params:
    """Train on scaled latents (mean, log-variance) [N, 8, 8, 16] of compositions `c`.

    `states` [object, style, background, variant, L, E] are the frozen encoder's states of every caption, `empty` [L, E]
    those of the empty one, which replaces a caption in one case of ten.
    """
    definition, params = params_lib.split(models.UNet2DConditionModel(CONFIG, rngs=nnx.Rngs(3)))
    alphas = jnp.asarray(schedulers.ddpm.alphas_cumprod(SCHEDULER))
    means, logvars = latents

    def batch(rng: np.random.Generator):
        n = RECIPE.batch
        index = rng.integers(len(means), size=n)
        picked = c.take(index)
        context = states[picked.object, picked.style, picked.background, rng.integers(corpus.VARIANTS, size=n)]
        context[rng.random(n) < UNCONDITIONAL_SHARE] = empty
        return means[index], logvars[index], context

    def loss(params, batch, key):
        mean, logvar, context = batch
        keys = jax.random.split(key, 3)
        x0 = mean + jnp.exp(0.5 * logvar) * jax.random.normal(keys[0], mean.shape)
        noise = jax.random.normal(keys[1], mean.shape)
        t = jax.random.randint(keys[2], (len(mean),), 0, SCHEDULER["num_train_timesteps"])
        noisy = schedulers.ddpm.add_noise(alphas, x0, noise, t)
        target = schedulers.ddpm.velocity(alphas, x0, noise, t)
        return jnp.square(definition.bind(params)(noisy, t, context) - target).mean()

    return training.train("unet", params, loss, batch, RECIPE, workdir)
