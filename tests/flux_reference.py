"""FLUX of diffusers, small and random: the transformers and pipelines of dev and schnell, and comparisons with ours."""

import functools
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from flax import nnx

import convert
from convert import rename
from spqr_jax import params as params_lib
from spqr_jax.backbones.models import FluxTransformer2DModel
from spqr_jax.generate import generate
from tests import flow_reference
from tests.conftest import write_tokenizer
from tests.parity import blocks, samples
from tests.parity.compared import Compared, nchw, relative_error

CLIP: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
}
TRANSFORMER: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": flow_reference.T5["d_model"],
    "pooled_projection_dim": CLIP["hidden_size"],
    "axes_dims_rope": (4, 6, 6),
}
KINDS = {"dev": {"guidance_embeds": True}, "schnell": {"guidance_embeds": False}}
NAMES = {"dev": "tiny FLUX.1 dev", "schnell": "tiny FLUX.1 schnell"}  # in the parity table
USUAL = {"dev": (3.5, 512), "schnell": (0.0, 256)}  # guidance, tokens of a text
FACTOR = 2  # pixels a latent of the VAE
SCHEDULERS = {"dev": {"shift": 3.0, "use_dynamic_shifting": True}, "schnell": {"shift": 1.0}}  # as published


class Inputs(NamedTuple):
    """latents [B, C, H, W], times [B] in 0..1000, context [B, M, E], pooled [B, P], guidance [B] or None."""

    latents: np.ndarray
    times: np.ndarray
    context: np.ndarray
    pooled: np.ndarray
    guidance: np.ndarray | None


def transformer(kind: str, seed: int = 0) -> torch.nn.Module:
    """diffusers' model with random weights, scales and biases too."""
    import diffusers

    torch.manual_seed(seed)
    return flow_reference.shaken(diffusers.FluxTransformer2DModel(**TRANSFORMER, **KINDS[kind]))


def pipeline(kind: str) -> Any:
    """diffusers' pipeline."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    model = transformer(kind)
    clip, t5 = (Path(tempfile.mkdtemp()) for _ in range(2))
    tokenizer, tokenizer_2 = write_tokenizer(clip), flow_reference.t5_tokenizer(t5)
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text_encoder = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), **ends, **CLIP))
    made = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**SCHEDULERS[kind]),
        vae=flow_reference.vae(),
        text_encoder=flow_reference.shaken(text_encoder),
        tokenizer=tokenizer,
        text_encoder_2=flow_reference.t5(len(tokenizer_2)),
        tokenizer_2=tokenizer_2,
        transformer=model,
    )
    made.set_progress_bar_config(disable=True)
    return made


def ours(model: torch.nn.Module) -> Any:
    """Our model with the same weights."""
    config = dict(model.config)
    definition, shapes = params_lib.skeleton(lambda: FluxTransformer2DModel(config, rngs=nnx.Rngs(0)))
    state = {key: tensor.detach().numpy() for key, tensor in model.state_dict().items()}
    params = rename.from_torch(state, shapes, component="unet", source="FLUX", name=lambda key: key)
    return definition.bind(params)


def inputs(kind: str, size: tuple[int, int] = (8, 6)) -> Inputs:
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    latents = draw(2, TRANSFORMER["in_channels"] // 4, *size)
    context, pooled = draw(2, 7, TRANSFORMER["joint_attention_dim"]), draw(2, TRANSFORMER["pooled_projection_dim"])
    # Multiples of 125: diffusers divides times by 1000 and multiplies them again.
    times, guidance = np.float32([875, 250]), np.float32([3.5, 1])
    return Inputs(latents, times, context, pooled, guidance if kind == "dev" else None)


def run(model: torch.nn.Module, given: Inputs) -> np.ndarray:
    """The reference's output, [B, C, H, W], packed and unpacked by diffusers' own pipeline."""
    from diffusers import FluxPipeline

    batch, channels, height, width = given.latents.shape
    latents, times, context, pooled = (torch.tensor(x) for x in given[:4])
    with torch.no_grad():
        out = model(
            hidden_states=FluxPipeline._pack_latents(latents, batch, channels, height, width),
            timestep=times / 1000,
            guidance=None if given.guidance is None else torch.tensor(given.guidance),
            pooled_projections=pooled,
            encoder_hidden_states=context,
            txt_ids=torch.zeros(context.shape[1], 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, "cpu", torch.float32),
        ).sample
    return FluxPipeline._unpack_latents(out, height, width, vae_scale_factor=1).numpy()


def of_blocks(kind: str) -> list[Compared]:
    """The largest error of every type of block."""
    model, given = transformer(kind), inputs(kind)
    rows = blocks.blocks(model, ours(model), NAMES[kind], lambda: run(model, given))
    # One last digit of a frequency, in which PyTorch's exp and ours differ, turns the largest angle by so much.
    digit = 1000 * 2**-23 * float(max(given.guidance) if given.guidance is not None else 1)
    return [row._replace(limit=max(row.limit, digit)) if row.block == "Timesteps" else row for row in rows]


def whole(kind: str, size: tuple[int, int] = (8, 6)) -> Compared:
    """The whole model, on latents that are not square."""
    model, given = transformer(kind), inputs(kind, size)
    found = ours(model)(given.latents.transpose(0, 2, 3, 1), *given[1:])
    return Compared("FluxTransformer2DModel", NAMES[kind], relative_error(nchw(found), run(model, given)))


@functools.cache
def saved(kind: str) -> tuple[Any, Path]:
    """(diffusers' pipeline, its saved directory), made once in a process."""
    made, directory = pipeline(kind), Path(tempfile.mkdtemp())
    made.save_pretrained(directory)
    return made, directory


def loaded(kind: str, side: int, length: int) -> tuple[Any, Any]:
    """(diffusers' pipeline, ours) for images of `side` latents and texts of `length` tokens."""
    made, directory = saved(kind)
    ours = convert.load(directory)
    small = ours.configs["transformer"] | {"sample_size": side}
    return made, ours._replace(text_length=length, configs=ours.configs | {"transformer": small})


def noise(count: int, size: tuple[int, int] = (8, 12)) -> np.ndarray:
    """Initial latents [N, h, w, C]."""
    return np.random.default_rng(0).standard_normal((count, *size, 16)).astype(np.float32)


def images(pipe: Any, prompts: list[str], latents: np.ndarray, steps: int, guidance: float, length: int) -> np.ndarray:
    """diffusers' images of these latents, float32 [N, H, W, 3] in 0..1, before rounding."""
    count, height, width, channels = latents.shape
    packed = pipe._pack_latents(torch.tensor(latents.transpose(0, 3, 1, 2)), count, channels, height, width)
    options = {"num_inference_steps": steps, "guidance_scale": guidance, "max_sequence_length": length}
    size = {"height": height * FACTOR, "width": width * FACTOR}
    return pipe(prompts, latents=packed, output_type="np", **options, **size).images


def sample(kind: str, ours: Any, steps: int) -> list[Compared]:
    """Two images in `steps` steps with the usual guidance and length of texts."""
    guidance, length = USUAL[kind]
    theirs = images(saved(kind)[0], samples.PROMPTS, noise(2), steps, guidance, length)
    assert theirs.std() > 0.02, "the reference is a flat image and proves nothing"
    size = {"height": theirs.shape[1], "width": theirs.shape[2]}
    options = {"scheduler": "flow_euler", "guidance": guidance, "latents": noise(2), **size}
    found = generate(ours, samples.PROMPTS, [0, 0], steps=steps, **options)
    return samples.rows("FlowMatchEulerDiscreteScheduler", NAMES[kind], steps, found, theirs)
