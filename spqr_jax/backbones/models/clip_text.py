"""CLIP's text encoders: CLIPTextModel (SD1, SD2) and CLIPTextModelWithProjection (SDXL's second)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from spqr_jax.backbones.models.attention import attention
from spqr_jax.backbones.models.layers import Embedding, LayerNorm, Linear
from spqr_jax.devices.target import CPU

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


class TextOutput(NamedTuple):
    """last_hidden_state [B, L, C] (after the final norm); hidden_states: the L+1 layer outputs before it;
    pooled [B, C] at the end-of-text token (None for T5); text_embeds [B, P] projected (None without projection)."""

    last_hidden_state: jax.Array
    hidden_states: list[jax.Array]
    pooled: jax.Array | None
    text_embeds: jax.Array | None


class CLIPAttention(nnx.Module):
    def __init__(self, dim: int, heads: int, *, rngs: nnx.Rngs):
        self.k_proj = Linear(dim, dim, rngs=rngs)
        self.v_proj = Linear(dim, dim, rngs=rngs)
        self.q_proj = Linear(dim, dim, rngs=rngs)
        self.out_proj = Linear(dim, dim, rngs=rngs)
        self.heads = heads
        self.target = CPU

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        q, k, v = (p(x).reshape(*x.shape[:2], self.heads, -1) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attention(q, k, v, target=self.target, mask=mask).reshape(x.shape))


class CLIPMLP(nnx.Module):
    def __init__(self, dim: int, hidden: int, act: str, *, rngs: nnx.Rngs):
        if act not in ACTIVATIONS:
            raise ValueError(f"CLIP config: hidden_act={act!r} is not supported (one of {sorted(ACTIVATIONS)}).")
        self.fc1 = Linear(dim, hidden, rngs=rngs)
        self.fc2 = Linear(hidden, dim, rngs=rngs)
        self.act = act

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(ACTIVATIONS[self.act](self.fc1(x)))


class CLIPEncoderLayer(nnx.Module):
    def __init__(self, c: dict[str, Any], *, rngs: nnx.Rngs):
        dim, eps = c["hidden_size"], c["layer_norm_eps"]
        self.self_attn = CLIPAttention(dim, c["num_attention_heads"], rngs=rngs)
        self.layer_norm1 = LayerNorm(dim, eps=eps, rngs=rngs)
        self.mlp = CLIPMLP(dim, c["intermediate_size"], c["hidden_act"], rngs=rngs)
        self.layer_norm2 = LayerNorm(dim, eps=eps, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(nnx.Module):
    def __init__(self, c: dict[str, Any], *, rngs: nnx.Rngs):
        self.layers = nnx.List([CLIPEncoderLayer(c, rngs=rngs) for _ in range(c["num_hidden_layers"])])

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> list[jax.Array]:
        states = [x]
        for layer in self.layers:
            states.append(layer(states[-1], mask))
        return states


class CLIPTextEmbeddings(nnx.Module):
    def __init__(self, c: dict[str, Any], *, rngs: nnx.Rngs):
        self.token_embedding = Embedding(c["vocab_size"], c["hidden_size"], rngs=rngs)
        self.position_embedding = Embedding(c["max_position_embeddings"], c["hidden_size"], rngs=rngs)


class CLIPTextTransformer(nnx.Module):
    def __init__(self, c: dict[str, Any], *, rngs: nnx.Rngs):
        self.embeddings = CLIPTextEmbeddings(c, rngs=rngs)
        self.encoder = CLIPEncoder(c, rngs=rngs)
        self.final_layer_norm = LayerNorm(c["hidden_size"], eps=c["layer_norm_eps"], rngs=rngs)


DEFAULTS: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 512,
    "eos_token_id": 49407,
}


class CLIPTextModel(nnx.Module):
    """Token ids [B, L] -> TextOutput, with a causal mask and no padding mask, as Stable Diffusion uses it.

    The pooled state is taken at the first end-of-text token. If the config says eos_token_id=2 (a known error of early
    files, kept by transformers), it is taken at the highest token id. `inputs_embeds` [B, L, C] replaces the rows of
    the token table, for attacks on embeddings.
    """

    with_projection = False

    def __init__(self, config: dict[str, Any], *, rngs: nnx.Rngs):
        c = DEFAULTS | {k: v for k, v in config.items() if k in DEFAULTS}
        self.text_model = CLIPTextTransformer(c, rngs=rngs)
        self.text_projection = nnx.data(None)
        if self.with_projection:
            self.text_projection = Linear(c["hidden_size"], c["projection_dim"], use_bias=False, rngs=rngs)
        self.eos = c["eos_token_id"]

    def __call__(self, ids: jax.Array, inputs_embeds: jax.Array | None = None) -> TextOutput:
        length = ids.shape[1]
        embeddings = self.text_model.embeddings
        x = embeddings.token_embedding(ids) if inputs_embeds is None else inputs_embeds
        x = x + embeddings.position_embedding(jnp.arange(length))
        states = self.text_model.encoder(x, jnp.tril(jnp.ones((length, length), bool)))
        last = self.text_model.final_layer_norm(states[-1])
        end = jnp.argmax(ids if self.eos == 2 else ids == self.eos, axis=-1)
        pooled = jnp.take_along_axis(last, end[:, None, None], axis=1)[:, 0]
        embeds = None if self.text_projection is None else self.text_projection(pooled)
        return TextOutput(last, states, pooled, embeds)


class CLIPTextModelWithProjection(CLIPTextModel):
    with_projection = True
