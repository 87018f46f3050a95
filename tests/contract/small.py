"""A small pipeline of every backbone, random weights drawn with NumPy.

`pipeline` has the real models. `quick` has the real text encoders, and beside them models that compile in a moment: a
UNet of one transformer, which has a weight in every region, and a codec without weights.
"""

from typing import Any

import jax
import numpy as np
from flax import nnx
from transformers import CLIPTokenizer

from spqr_jax import backbones, mini
from spqr_jax import params as params_lib
from spqr_jax.backbones.models.layers import Conv, GroupNorm, timestep_embedding
from spqr_jax.backbones.models.unet import TimestepEmbedding, Transformer2DModel
from spqr_jax.pipeline import Pipeline
from tests import stand_in

SIDE, FACTOR, LENGTH, WIDTH, POOLED = 4, 2, 12, 8, 8  # latents of a side, pixels a latent, tokens, sizes of text states
CHANNELS, GROUPS, HEADS = 8, 2, 2
UNET: dict[str, Any] = {
    "sample_size": SIDE,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (CHANNELS,),
    "layers_per_block": 1,
    "attention_head_dim": HEADS,
    "norm_num_groups": GROUPS,
    "cross_attention_dim": WIDTH,
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}
# SDXL's UNet reads the states of two encoders side by side, the second's pooled state, and six sizes.
SDXL_UNET = UNET | {
    "cross_attention_dim": 2 * WIDTH,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + POOLED,
}
VAE = {"block_out_channels": (4, 4), "latent_channels": 4, "norm_num_groups": 2, "layers_per_block": 1}
TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": LENGTH,
    "projection_dim": POOLED,
}
SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def configs(key: str) -> dict[str, dict[str, Any]]:
    """component -> config, for the backbone with this key."""
    tokens = tokenizer()
    text = TEXT | {"vocab_size": len(tokens), "eos_token_id": tokens.eos_token_id}
    shared = {"vae": VAE, "text_encoder": text}
    return {"sd": {"unet": UNET, **shared}, "sdxl": {"unet": SDXL_UNET, **shared, "text_encoder_2": text}}[key]


def two_blocks(key: str) -> dict[str, Any]:
    """The config of the denoiser, with two blocks on each way instead of one."""
    config = configs(key)["unet"]
    doubled = ("block_out_channels", "down_block_types", "up_block_types")
    return config | {name: 2 * config[name] for name in doubled}


def tokenizer() -> CLIPTokenizer:
    """The emoji world's, for shorter texts."""
    return CLIPTokenizer.from_pretrained(str(mini.model_path() / "tokenizer"), model_max_length=LENGTH)


def pipeline(key: str, **defined: Any) -> Pipeline:
    """A pipeline of the backbone with this key. defined: component -> (definition, shapes) of other models than its."""
    rng, parts = np.random.default_rng(0), configs(key)
    found = {name: backbones.define(name, config) for name, config in parts.items() if name not in defined} | defined
    params = {name: jax.tree.map(lambda shape: _drawn(rng, shape), found[name][1]) for name in parts}
    definitions = {name: found[name][0] for name in parts}
    tokenizers = {name.replace("text_encoder", "tokenizer"): tokenizer() for name in parts if "text" in name}
    return Pipeline(params, definitions, {**parts, "scheduler": SCHEDULER}, tokenizers, f"small {key}")


def quick(key: str) -> Pipeline:
    """As `pipeline`, with a UNet and a VAE that compile in a moment."""
    unet = params_lib.skeleton(lambda: QuickUNet(configs(key)["unet"], rngs=nnx.Rngs(0)))
    return pipeline(key, unet=unet, vae=(stand_in.Codec(), {}))


def _drawn(rng: np.random.Generator, shape: Any) -> np.ndarray:
    """Scales and biases about 1, other weights of the size that keeps their outputs at the size of their inputs."""
    noise = rng.standard_normal(shape.shape).astype(np.float32)
    return noise / np.sqrt(np.prod(shape.shape[:-1])).astype(np.float32) if noise.ndim > 1 else 1 + noise / 10


class Empty(nnx.Module):
    """A block without weights, so that the ones after it have the numbers that they have in a whole UNet."""


class Block(nnx.Module):
    def __init__(self, transformer: nnx.Module):
        self.attentions = nnx.List([Empty(), transformer])


class QuickUNet(nnx.Module):
    """The beginning and the end of a UNet, with its layer up_blocks.1.attentions.1 between them."""

    def __init__(self, config: dict[str, Any], *, rngs: nnx.Rngs):
        self.conv_in = Conv(4, CHANNELS, 1, padding=0, rngs=rngs)
        self.time_embedding = TimestepEmbedding(CHANNELS, CHANNELS, rngs=rngs)
        context = config["cross_attention_dim"]
        layer = Transformer2DModel(CHANNELS, HEADS, context, 1, linear=True, groups=GROUPS, rngs=rngs)
        self.up_blocks = nnx.List([Empty(), Block(layer)])
        self.conv_norm_out = GroupNorm(GROUPS, CHANNELS, eps=1e-5, rngs=rngs)
        self.conv_out = Conv(CHANNELS, 4, 1, padding=0, rngs=rngs)

    def __call__(self, latents, timesteps, context, text_embeds=None, time_ids=None):
        time = timestep_embedding(timesteps, CHANNELS, flip_sin_to_cos=True, freq_shift=0)
        if text_embeds is not None:
            time = time + text_embeds + time_ids.sum(-1, keepdims=True) / 1000
        x = self.conv_in(latents) + self.time_embedding(time)[:, None, None]
        x = self.up_blocks[1].attentions[1](x, context)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))
