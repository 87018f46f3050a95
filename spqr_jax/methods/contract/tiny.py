"""A tiny pipeline of every backbone: the real models at sizes that compile in seconds, with random weights.

The weights are drawn with NumPy, and the tokenizer is the emoji world's, so nothing is read but what ships.
"""

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from transformers import CLIPTokenizer

from spqr_jax import backbones, mini
from spqr_jax.pipeline import Pipeline

SIDE, FACTOR, LENGTH, WIDTH, POOLED = 4, 2, 12, 8, 8  # latents of a side, pixels a latent, tokens, sizes of text states
CHANNELS, GROUPS, HEADS = 8, 2, 2
UNET: dict[str, Any] = {
    "sample_size": SIDE,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (CHANNELS, CHANNELS),
    "layers_per_block": 1,
    "attention_head_dim": HEADS,
    "norm_num_groups": GROUPS,
    "cross_attention_dim": WIDTH,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),  # methods name up_blocks.1.attentions.1
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
# SD3 reads the states of two CLIPs side by side, T5's behind them, and both pooled states.
T5: dict[str, Any] = {"vocab_size": 64, "d_model": 2 * WIDTH, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
T5 |= {"feed_forward_proj": "gated-gelu", "architectures": ["T5EncoderModel"]}
SD3: dict[str, Any] = {
    "_class_name": "SD3Transformer2DModel",
    "sample_size": SIDE,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": HEADS,
    "joint_attention_dim": 2 * WIDTH,
    "caption_projection_dim": 8 * HEADS,
    "pooled_projection_dim": 2 * POOLED,
    "pos_embed_max_size": 8,
}
# FLUX reads the states of T5, and the pooled states of a CLIP; this one is dev, which reads guidance too.
FLUX: dict[str, Any] = {
    "_class_name": "FluxTransformer2DModel",
    "sample_size": SIDE,
    "in_channels": 4 * 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": HEADS,
    "joint_attention_dim": 2 * WIDTH,
    "pooled_projection_dim": WIDTH,
    "axes_dims_rope": (2, 2, 4),
    "guidance_embeds": True,
}
SD3_VAE = VAE | {"scaling_factor": 1.5, "shift_factor": 0.1, "use_quant_conv": False, "use_post_quant_conv": False}
PROJECTED = TEXT | {"architectures": ["CLIPTextModelWithProjection"]}
SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
# key of a backbone -> the configs of its components, but for the text encoders' vocabulary
COMPONENTS: dict[str, dict[str, dict[str, Any]]] = {
    "sd": {"unet": UNET, "vae": VAE, "text_encoder": TEXT},
    "sdxl": {"unet": SDXL_UNET, "vae": VAE, "text_encoder": TEXT, "text_encoder_2": TEXT},
    "sd3": {
        "transformer": SD3,
        "vae": SD3_VAE,
        "text_encoder": PROJECTED,
        "text_encoder_2": PROJECTED,
        "text_encoder_3": T5,
    },
    "flux": {"transformer": FLUX, "vae": SD3_VAE, "text_encoder": TEXT, "text_encoder_2": T5},
}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
SCHEDULERS = {"sd3": FLOW, "flux": FLOW | {"use_dynamic_shifting": True}}


def configs(key: str) -> dict[str, dict[str, Any]]:
    """component -> config, for the backbone with this key. Raises KeyError for a backbone without a tiny model."""
    tokens = tokenizer()
    words = {"vocab_size": len(tokens), "eos_token_id": tokens.eos_token_id}
    clips = (TEXT, PROJECTED)
    return {name: config | words if config in clips else config for name, config in COMPONENTS[key].items()}


def tokenizer() -> CLIPTokenizer:
    """The emoji world's, for shorter texts."""
    return CLIPTokenizer.from_pretrained(str(mini.model_path() / "tokenizer"), model_max_length=LENGTH)


def t5_tokens(texts: str | list[str], *, max_length: int = 0, **_: Any) -> SimpleNamespace:
    """In the place of T5's tokenizer: a number for each letter, and for one text an end."""
    if isinstance(texts, str):
        return SimpleNamespace(input_ids=[*(ord(letter) % T5["vocab_size"] for letter in texts), 1])
    ids = [[ord(letter) % T5["vocab_size"] for letter in text.ljust(max_length)[:max_length]] for text in texts]
    return SimpleNamespace(input_ids=np.array(ids))


def pipeline(key: str, **defined: Any) -> Pipeline:
    """A pipeline of the backbone with this key. defined: component -> (definition, shapes) of other models than its."""
    rng, parts = np.random.default_rng(0), configs(key)
    found = {name: backbones.define(name, config) for name, config in parts.items() if name not in defined} | defined
    params = {name: jax.tree.map(lambda shape: _drawn(rng, shape), found[name][1]) for name in parts}
    definitions = {name: found[name][0] for name in parts}
    tokenizers: dict[str, Any] = {
        name.replace("text_encoder", "tokenizer"): tokenizer() for name in parts if "text" in name
    }
    long = [name for name, config in parts.items() if config is T5]
    tokenizers |= dict.fromkeys((name.replace("text_encoder", "tokenizer") for name in long), t5_tokens)
    parts |= {"scheduler": SCHEDULERS.get(key, SCHEDULER)}
    length = LENGTH if long else None
    return Pipeline(params, definitions, parts, tokenizers, f"tiny {key}", text_length=length)


def _drawn(rng: np.random.Generator, shape: Any) -> np.ndarray:
    """Scales and biases about 1, other weights of the size that keeps their outputs at the size of their inputs."""
    noise = rng.standard_normal(shape.shape).astype(np.float32)
    return noise / np.sqrt(np.prod(shape.shape[:-1])).astype(np.float32) if noise.ndim > 1 else 1 + noise / 10
