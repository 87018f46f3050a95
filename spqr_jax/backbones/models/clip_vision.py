"""CLIP's image encoder, for training the CLIP of the emoji world. Judges run theirs as ONNX graphs."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from spqr_jax.backbones.models.clip_text import CLIPEncoder
from spqr_jax.backbones.models.layers import Conv, Embedding, LayerNorm, Linear

DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 512,
}


class CLIPVisionEmbeddings(nnx.Module):
    def __init__(self, c: dict[str, Any], *, rngs: nnx.Rngs):
        dim, patch = c["hidden_size"], c["patch_size"]
        self.class_embedding = nnx.Param(jax.random.normal(rngs.params(), (dim,)) * dim**-0.5)
        self.patch_embedding = Conv(3, dim, patch, stride=patch, padding=0, use_bias=False, rngs=rngs)
        self.position_embedding = Embedding((c["image_size"] // patch) ** 2 + 1, dim, rngs=rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        patches = self.patch_embedding(pixels)
        batch, dim = patches.shape[0], patches.shape[-1]
        start = jnp.broadcast_to(self.class_embedding[...], (batch, 1, dim))
        x = jnp.concatenate([start, patches.reshape(batch, -1, dim)], axis=1)
        return x + self.position_embedding(jnp.arange(x.shape[1]))


class CLIPVisionTransformer(nnx.Module):
    def __init__(self, c: dict[str, Any], *, rngs: nnx.Rngs):
        dim, eps = c["hidden_size"], c["layer_norm_eps"]
        self.embeddings = CLIPVisionEmbeddings(c, rngs=rngs)
        self.pre_layrnorm = LayerNorm(dim, eps=eps, rngs=rngs)  # transformers' spelling
        self.encoder = CLIPEncoder(c, rngs=rngs)
        self.post_layernorm = LayerNorm(dim, eps=eps, rngs=rngs)


class CLIPVisionModelWithProjection(nnx.Module):
    """Normalised pixels [B, H, W, 3] -> image embeddings [B, P], not yet of unit length."""

    def __init__(self, config: dict[str, Any], *, rngs: nnx.Rngs):
        c = DEFAULTS | {k: v for k, v in config.items() if k in DEFAULTS}
        self.vision_model = CLIPVisionTransformer(c, rngs=rngs)
        self.visual_projection = Linear(c["hidden_size"], c["projection_dim"], use_bias=False, rngs=rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        model = self.vision_model
        x = model.encoder(model.pre_layrnorm(model.embeddings(pixels)))[-1]
        return self.visual_projection(model.post_layernorm(x[:, 0]))
