"""Whole models, and the formulations of convolution and attention, against PyTorch: what the parity tests assert and
`tests.parity.table` prints."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import torch

from spqr_jax.backbones.models import attention, layers
from spqr_jax.pipeline import Pipeline

BLOCK, FULL_UNET = 1e-5, 5e-5


class Compared(NamedTuple):
    """One entry of the table: the largest error of `cases` outputs, what it may be, the smallest that can be seen."""

    block: str
    config: str
    error: float
    limit: float = BLOCK
    cases: int = 1
    resolution: float = 0.0


def relative_error(ours: Any, theirs: Any) -> float:
    """Largest absolute difference over the reference's largest absolute value, in float64. Raises on shapes."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, f"shape {ours.shape}, expected {theirs.shape}"
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def torch_shapes(skeleton: Any) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every leaf, as PyTorch has them."""
    from convert import rename
    from spqr_jax import params as params_lib

    flat = params_lib.flatten(skeleton)
    # A transpose of a stand-in with one byte, so that no array of the model's size is made.
    hollow = {path: np.broadcast_to(np.zeros((), np.int8), leaf.shape) for path, leaf in flat.items()}
    turned = {path: rename.transposed(path, array) for path, array in hollow.items()}
    return {rename.torch_name(path): array.shape for path, array in turned.items()}


def nchw(x: Any) -> np.ndarray:
    return np.asarray(x).transpose(0, 3, 1, 2)


def bound(pipeline: Pipeline, component: str) -> Any:
    """A component with its weights, ready to be called."""
    return pipeline.definitions[component].bind(pipeline.params[component])


class UNetInputs(NamedTuple):
    """Random inputs of a UNet in PyTorch's layout; added [B, P] and time_ids [B, 6] for SDXL, else None."""

    latents: np.ndarray
    timesteps: np.ndarray
    context: np.ndarray
    text_embeds: np.ndarray | None
    time_ids: np.ndarray | None


def unet_inputs(config: dict[str, Any], *, batch: int = 2, side: tuple[int, int] | None = None) -> UNetInputs:
    rng = np.random.default_rng(0)
    height, width = side or (config["sample_size"],) * 2
    latents = rng.standard_normal((batch, config["in_channels"], height, width)).astype(np.float32)
    context = rng.standard_normal((batch, 77, config["cross_attention_dim"])).astype(np.float32)
    timesteps = np.linspace(3, 801, batch).astype(np.int64)
    if config.get("addition_embed_type") is None:
        return UNetInputs(latents, timesteps, context, None, None)
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    embeds = rng.standard_normal((batch, pooled)).astype(np.float32)
    return UNetInputs(latents, timesteps, context, embeds, np.tile([64, 64, 0, 0, 64, 64], (batch, 1)))


def torch_unet(model: torch.nn.Module, inputs: UNetInputs) -> np.ndarray:
    """The reference's output, [B, C, H, W]."""
    latents, timesteps, context = (torch.tensor(x) for x in inputs[:3])
    added = None
    if inputs.text_embeds is not None:
        added = {"text_embeds": torch.tensor(inputs.text_embeds), "time_ids": torch.tensor(inputs.time_ids)}
    with torch.no_grad():
        return model(latents, timesteps, context, added_cond_kwargs=added).sample.numpy()


def our_unet(model: Any, inputs: UNetInputs) -> np.ndarray:
    """Our output, [B, C, H, W]."""
    return nchw(model(inputs.latents.transpose(0, 2, 3, 1), *inputs[1:]))


def unet(pipe: Any, pipeline: Pipeline, config: str, side: tuple[int, int] | None = None) -> list[Compared]:
    """`side` in latent pixels; sizes that do not halve evenly follow PyTorch's nearest neighbour on the way up."""
    inputs = unet_inputs(dict(pipe.unet.config), side=side)
    ours = our_unet(bound(pipeline, "unet"), inputs)
    size = "" if side is None else f", {side[0]}x{side[1]} latents"
    return [Compared(f"UNet2DConditionModel{size}", config, relative_error(ours, torch_unet(pipe.unet, inputs)))]


class SD3Inputs(NamedTuple):
    """Random inputs of SD3's transformer in PyTorch's layout."""

    latents: np.ndarray
    times: np.ndarray
    context: np.ndarray
    pooled: np.ndarray


def sd3_inputs(config: dict[str, Any], *, batch: int = 2, side: tuple[int, int] | None = None) -> SD3Inputs:
    rng = np.random.default_rng(0)
    height, width = side or (config["sample_size"],) * 2
    shapes = (config["in_channels"], height, width), (13, config["joint_attention_dim"])
    latents, context = (rng.standard_normal((batch, *shape)).astype(np.float32) for shape in shapes)
    pooled = rng.standard_normal((batch, config["pooled_projection_dim"])).astype(np.float32)
    return SD3Inputs(latents, np.linspace(999.1, 3.7, batch).astype(np.float32), context, pooled)


def torch_sd3(model: torch.nn.Module, inputs: SD3Inputs) -> np.ndarray:
    """The reference's output, [B, C, H, W]."""
    latents, times, context, pooled = map(torch.tensor, inputs)
    with torch.no_grad():
        output = model(latents, timestep=times, encoder_hidden_states=context, pooled_projections=pooled)
    return output.sample.numpy()


def our_sd3(model: Any, inputs: SD3Inputs) -> np.ndarray:
    """Our output, [B, C, H, W]."""
    return nchw(model(inputs.latents.transpose(0, 2, 3, 1), *inputs[1:]))


def sd3(model: torch.nn.Module, pipeline: Pipeline, config: str, side: tuple[int, int] | None = None) -> list[Compared]:
    """The whole transformer of SD3. `side` in latent pixels."""
    inputs = sd3_inputs(dict(model.config), side=side)
    error = relative_error(our_sd3(bound(pipeline, "transformer"), inputs), torch_sd3(model, inputs))
    size = "" if side is None else f", {side[0]}x{side[1]} latents"
    return [Compared(f"SD3Transformer2DModel{size}", config, error)]


def t5(model: torch.nn.Module, pipeline: Pipeline, component: str, config: str) -> list[Compared]:
    """Last and penultimate states of T5."""
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 77))
    with torch.no_grad():
        theirs = model(torch.tensor(ids), output_hidden_states=True)
    ours = bound(pipeline, component)(ids)
    pairs = {"last": (ours.last_hidden_state, theirs.last_hidden_state)}
    pairs["penultimate"] = ours.hidden_states[-2], theirs.hidden_states[-2]
    return [Compared(f"T5EncoderModel, {what} states", config, relative_error(*pair)) for what, pair in pairs.items()]


def text_encoders(pipe: Any, pipeline: Pipeline, config: str, prompts: list[str]) -> list[Compared]:
    """Last and penultimate states, and the pooled or projected one, of every text encoder."""
    rows = []
    for component in ("text_encoder", "text_encoder_2"):
        if component not in pipeline.params:
            continue
        ids = token_ids(pipe, prompts)
        model = getattr(pipe, component)
        with torch.no_grad():
            theirs = model(torch.tensor(ids), output_hidden_states=True)
        ours = bound(pipeline, component)(ids)
        name = type(model).__name__
        states = (ours.last_hidden_state, theirs.last_hidden_state), (ours.hidden_states[-2], theirs.hidden_states[-2])
        pooled = (
            (ours.text_embeds, theirs.text_embeds)
            if component == "text_encoder_2"
            else (ours.pooled, theirs.pooler_output)
        )
        labels = "last states", "penultimate states", "projected" if component == "text_encoder_2" else "pooled"
        rows += [
            Compared(f"{name}, {label}", config, relative_error(*pair))
            for label, pair in zip(labels, (*states, pooled), strict=True)
        ]
    return rows


def token_ids(pipe: Any, prompts: list[str]) -> np.ndarray:
    return pipe.tokenizer(prompts, padding="max_length", return_tensors="np").input_ids


def vae(pipe: Any, pipeline: Pipeline, config: str) -> list[Compared]:
    """Mean and log-variance of random images, and images of that mean."""
    side = pipe.vae.config.sample_size
    images = np.random.default_rng(0).uniform(-1, 1, (2, 3, side, side)).astype(np.float32)
    with torch.no_grad():
        posterior = pipe.vae.encode(torch.tensor(images)).latent_dist
        decoded = pipe.vae.decode(posterior.mean).sample
    ours = bound(pipeline, "vae")
    mean, logvar = ours.encode(images.transpose(0, 2, 3, 1))
    pairs = {
        "encode, mean": (nchw(mean), posterior.mean),
        "encode, log-variance": (nchw(logvar), posterior.logvar),
        "decode": (nchw(ours.decode(posterior.mean.numpy().transpose(0, 2, 3, 1))), decoded),
    }
    return [Compared(f"AutoencoderKL.{what}", config, relative_error(*pair)) for what, pair in pairs.items()]


def sd15_unet(side: int = 64) -> list[Compared]:
    """Stable Diffusion 1.5's whole UNet, all 859,520,964 parameters of it random; 8 GiB, half a minute on 2 cores."""
    import diffusers

    from convert import rename
    from spqr_jax import backbones

    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        cross_attention_dim=768
    ).eval()  # every other field at its default is SD1.5's
    definition, shapes = backbones.define("unet", dict(model.config))
    state = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
    params = rename.from_torch(state, shapes, component="unet", source="a random SD1.5 UNet")
    inputs = unet_inputs(dict(model.config), batch=1, side=(side, side))
    error = relative_error(our_unet(definition.bind(params), inputs), torch_unet(model, inputs))
    return [Compared("UNet2DConditionModel", f"full SD1.5, {side}x{side} latents", error, FULL_UNET)]


# [B, H, W, C], output channels, kernel, stride: on both sides of the number of pixels at which the formulation changes.
CONVOLUTIONS = {
    "few pixels": ((2, 8, 8, 96), 64, 3, 1),
    "few pixels, stride 2": ((2, 9, 8, 96), 64, 3, 2),
    "many pixels": ((2, 32, 40, 24), 32, 3, 1),
    "many pixels, stride 2": ((2, 32, 41, 24), 32, 3, 2),
    "1x1": ((2, 8, 8, 96), 64, 1, 1),
}
# [B, L, N, D] and M keys: with all scores at once, head by head, and head by head in chunks of queries.
ATTENTIONS = {"all heads at once": ((2, 64, 4, 40), 77), "head by head": ((2, 300, 4, 40), 300)}
ATTENTIONS["head by head, in chunks"] = ((1, 2048, 2, 40), 77)


def formulations() -> list[Compared]:
    """Every way that `conv` and `attention` compute on a CPU, at shapes that make them choose it."""
    rows = []
    for name, (shape, cout, size, stride) in CONVOLUTIONS.items():
        rng = np.random.default_rng(0)
        x, kernel = (rng.standard_normal(s).astype(np.float32) for s in (shape, (size, size, shape[-1], cout)))
        pad = size // 2
        ours = layers.conv(jnp.asarray(x), jnp.asarray(kernel), stride, ((pad, pad), (pad, pad)))
        weight = torch.tensor(kernel.transpose(3, 2, 0, 1).copy())
        theirs = torch.nn.functional.conv2d(torch.tensor(nchw(x)), weight, stride=stride, padding=pad)
        rows.append(Compared("conv()", name, relative_error(nchw(ours), theirs)))
    for name, (shape, keys) in ATTENTIONS.items():
        rng = np.random.default_rng(0)
        kv = (shape[0], keys, *shape[2:])
        q, k, v = (rng.standard_normal(s).astype(np.float32) for s in (shape, kv, kv))
        heads_first = (torch.tensor(x.transpose(0, 2, 1, 3)) for x in (q, k, v))
        theirs = torch.nn.functional.scaled_dot_product_attention(*heads_first).numpy().transpose(0, 2, 1, 3)
        rows.append(
            Compared("attention()", name, relative_error(attention.attention(*map(jnp.asarray, (q, k, v))), theirs))
        )
    return rows
