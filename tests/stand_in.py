"""A model small enough to compile in a second, in JAX and in PyTorch, for tests of what methods do with a UNet.

It takes the parameters of any UNet and depends on every one of them, on latents, timestep and text, likewise for the
text encoder. The models themselves are compared with diffusers elsewhere; here each test would only compile them.
"""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax import params as params_lib
from spqr_jax.backbones import Denoiser
from spqr_jax.backbones.models.clip_text import TextOutput
from spqr_jax.backbones.noising import DDPM
from spqr_jax.backbones.stable_diffusion import STABLE_DIFFUSION
from spqr_jax.pipeline import Pipeline

SUMS = 4
# Some of every kind that a method may tell apart: what is left out would only be compiled.
KEPT = re.compile(
    r"^(conv_in|conv_norm_out|conv_out|time_embedding\.linear_1)\."
    r"|^up_blocks\.1\.(attentions\.1\..*\.(attn[12]\.(to_k|to_out\.0)|norm2)|resnets\.0\.time_emb_proj)\."
    r"|^text_model\.(embeddings|final_layer_norm|encoder\.layers\.0\.self_attn\.q_proj)\."
)


def waves(size: int) -> np.ndarray:
    """Fixed weights [SUMS, size]; no two elements alike."""
    k = np.arange(1, SUMS + 1)[:, None]
    return np.cos(0.37 * k * np.arange(size) + k).astype(np.float32)


def _sums(params):
    leaves = [leaf for _, leaf in sorted(params_lib.flatten(params).items())]
    return sum(jnp.asarray(waves(leaf.size)) @ leaf.reshape(-1) / np.sqrt(leaf.size) for leaf in leaves) / len(leaves)


class UNet(NamedTuple):
    """In the place of a Definition."""

    def bind(self, params):
        s = _sums(params)

        def unet(latents, t, context, pooled=None, time_ids=None):
            del pooled, time_ids
            text = jnp.asarray(waves(context[0].size)) @ context.reshape(len(context), -1).T  # [SUMS, B]
            text, time = text[:, :, None, None, None] / 30, (t / 1000)[:, None, None, None]
            return jnp.tanh(latents * (1 + s[0]) + s[1] * time + text[0]) + s[2] * text[1] * latents + s[3] * text[2]

        return unet


def denoiser(model: UNet) -> Denoiser:
    """One of SD1.x made of a stand-in."""
    return Denoiser(STABLE_DIFFUSION, model, "epsilon")


class TextEncoder(NamedTuple):
    """In the place of the text encoder's: causal, and dependent on all its parameters."""

    def bind(self, params):
        s, table = _sums(params), params["text_model"]["embeddings"]["token_embedding"]["embedding"]

        def encoder(ids, inputs_embeds=None):
            words = table[ids] if inputs_embeds is None else inputs_embeds
            states = jnp.tanh(20 * words * (1 + s[0]) + s[1] * jnp.cumsum(words, axis=1))
            return TextOutput(states, [states, states], states[:, -1], None)

        return encoder


def _torch_sums(leaves: dict):
    import torch

    return sum(
        torch.tensor(waves(leaf.numel())) @ leaf.reshape(-1) / leaf.numel() ** 0.5 for leaf in leaves.values()
    ) / len(leaves)


def torch_unet(leaves: dict):
    """UNet's function of a flat dict of tensors; latents [B, h, w, C] as in JAX."""
    import torch

    s = _torch_sums(leaves)

    def unet(latents, t, context):
        text = torch.tensor(waves(context[0].numel())) @ context.reshape(len(context), -1).T
        text, time = text[:, :, None, None, None] / 30, (t / 1000)[:, None, None, None]
        return torch.tanh(latents * (1 + s[0]) + s[1] * time + text[0]) + s[2] * text[1] * latents + s[3] * text[2]

    return unet


def torch_text(leaves: dict):
    """TextEncoder's function of a flat dict of tensors, of word vectors [B, L, E]."""
    import torch

    s = _torch_sums(leaves)
    return lambda words: torch.tanh(20 * words * (1 + s[0]) + s[1] * torch.cumsum(words, dim=1))


class Codec(NamedTuple):
    """In the place of the VAE's Definition: two pixels a latent along each side, four channels."""

    def bind(self, params):
        del params
        return self

    def encode(self, pixels):
        mean = pixels.reshape(len(pixels), pixels.shape[1] // 2, 2, pixels.shape[2] // 2, 2, 3).mean((2, 4))
        mean = jnp.concatenate([mean, mean[..., :1]], axis=-1)
        return mean, jnp.full_like(mean, -4.0)

    def decode(self, latents):
        return jnp.repeat(jnp.repeat(latents[..., :3], 2, axis=1), 2, axis=2)


def pipeline(real: Pipeline) -> Pipeline:
    """The pipeline with these models, a share of its parameters under their names, and its tokenizer."""
    kept = {}
    for name in ("unet", "text_encoder"):
        leaves = params_lib.flatten(real.params[name])
        kept[name] = params_lib.unflatten({path: leaf for path, leaf in leaves.items() if KEPT.search(path)})
    definitions = {**real.definitions, "unet": UNet(), "text_encoder": TextEncoder(), "vae": Codec()}
    return real.with_params(**kept)._replace(definitions=definitions)


def tensors(params) -> dict:
    """Leaves by path, in sorted order, as tensors that take gradients."""
    import torch

    return {path: torch.tensor(np.asarray(leaf), requires_grad=True) for path, leaf in sorted(flat(params).items())}


flat = params_lib.flatten


def drawn(key, batch):
    """What a training step draws, as tensors (noised latents, noise, t), noised by the definition of DDPM."""
    import torch

    drawn = DDPM.draw(key, batch["mean"], batch["std"], np.zeros(1000))
    latents, noise, t = (torch.tensor(np.asarray(x)) for x in drawn)
    return noised(latents, noise, t.long()), noise, t


def noised(latents, noise, t):
    import torch

    power = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)[t].reshape(-1, 1, 1, 1)
    return power.sqrt() * latents + (1 - power).sqrt() * noise


def gradients(loss, leaves: dict) -> dict[str, np.ndarray]:
    """d loss / d leaf, by path."""
    import torch

    return {p: g.numpy() for p, g in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)}


def assert_close(ours, theirs: dict[str, np.ndarray], tolerance: float = 1e-4) -> None:
    """Every leaf within `tolerance` of the largest entry of its reference."""
    found = flat(ours)
    assert set(found) == set(theirs)
    for path, reference in theirs.items():
        difference = np.abs(np.asarray(found[path]) - reference).max()
        assert difference <= tolerance * np.abs(reference).max(), f"{path}: {difference}"


def changed(before, after) -> set[str]:
    """Paths of the leaves that are not bit-identical."""
    new = flat(after)
    return {path for path, leaf in flat(before).items() if not np.array_equal(leaf, new[path])}


def vector(tree) -> np.ndarray:
    """All leaves in sorted order, float64 [N]."""
    return np.concatenate([np.asarray(leaf, np.float64).reshape(-1) for _, leaf in sorted(flat(tree).items())])


def jitted(gradient, static, *inputs):
    return jax.jit(gradient, static_argnums=0)(static, *inputs)
