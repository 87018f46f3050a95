"""Text to pictures: one compiled program per (shape, steps, scheduler), whole denoising loop inside, data-parallel."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from spqr_jax import pipeline as pipeline_lib
from spqr_jax import schedulers
from spqr_jax.devices import mesh as mesh_lib
from spqr_jax.params import Definition, Params
from spqr_jax.pipeline import Pipeline
from spqr_jax.sampling import attached as attached_lib
from spqr_jax.sampling import batch_size as batch_size_lib
from spqr_jax.sampling import noise as noise_lib
from spqr_jax.sampling.attached import Attached, Strength
from spqr_jax.sampling.attached import membranes as membranes_lib

Array = jax.Array | np.ndarray


class Conditioning(NamedTuple):
    """What one batch is denoised under. Leaves [B, ...]; pooled and time_ids are None but for SDXL, unsafe (the text
    guided away from) but for Safe Latent Diffusion, permeability but for membranes."""

    context: Array  # [B, L, E]
    negative: Array  # [B, L, E]
    guidance: Array  # [B]
    pooled: Array | None = None
    negative_pooled: Array | None = None
    time_ids: Array | None = None
    unsafe: Array | None = None  # [B, L, E]
    permeability: Array | None = None  # [B, M]


def generate(
    pipeline: Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int] | int,
    *,
    steps: int = 50,
    guidance: float | Sequence[float] = 7.5,
    height: int | None = None,
    width: int | None = None,
    negative: str = "",
    scheduler: str = "pndm",
    latents: np.ndarray | None = None,
    noise: str = "jax",
    mesh: Mesh | None = None,
    batch_size: int | None = None,
    fsdp: bool = False,
) -> np.ndarray:
    """Pictures for prompts.

    Args:
        prompts: N texts.
        seeds: N seeds in 0..2**32-1, one a picture; or one seed, then picture i uses fold_in(key(seed), i).
        steps: denoising steps; `scheduler` one of "pndm", "ddim", "euler", "dpmpp".
        guidance: classifier-free guidance scale, one or N; at 1 or below it is off (as in diffusers).
        height, width: pixels, default the size the UNet was trained at.
        negative: negative prompt.
        latents: initial noise [N, H/f, W/f, C], standard normal, instead of the seeds'.
        noise: "jax", or "torch" for the noise of torch.Generator("cpu").manual_seed(seed).
        mesh: devices (default: all).
        batch_size: pictures a batch over all devices (default: `largest_batch`); changes no noise.
        fsdp: weights split over the devices, for models that do not fit whole; gathered at every step.

    What is attached to the pipeline acts here (`spqr_jax.sampling.attached`); safety guidance on pictures with guidance
    alone.

    Returns images_u8 uint8 [N, height, width, 3] RGB. Raises ValueError for arguments that do not fit each other and
    FloatingPointError naming the step and prompt when latents or pixels are not finite.
    """
    parts = [
        images
        for _, images in batches(
            pipeline,
            prompts,
            seeds,
            steps=steps,
            guidance=guidance,
            height=height,
            width=width,
            negative=negative,
            scheduler=scheduler,
            latents=latents,
            noise=noise,
            mesh=mesh,
            batch_size=batch_size and min(batch_size, len(prompts) or 1),
            fsdp=fsdp,
        )
    ]
    return np.concatenate(parts) if parts else np.zeros((0, *_size(pipeline, height, width), 3), np.uint8)


def batches(
    pipeline: Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int] | int,
    *,
    steps: int = 50,
    guidance: float | Sequence[float] = 7.5,
    height: int | None = None,
    width: int | None = None,
    negative: str = "",
    scheduler: str = "pndm",
    latents: np.ndarray | None = None,
    noise: str = "jax",
    mesh: Mesh | None = None,
    batch_size: int | None = None,
    fsdp: bool = False,
) -> Iterator[tuple[int, np.ndarray]]:
    """As `generate`, batch by batch: yields (index of the first picture, images_u8). The next batch is already being
    computed while the caller works on this one. A last batch, or only one, of fewer than `batch_size` is padded to it,
    so that a part of a sweep made alone is made by the same program."""
    count = len(prompts)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, found {batch_size}.")
    size = _size(pipeline, height, width)
    shape = _latent_shape(pipeline, size)
    scales = _guidance(guidance, count)
    mesh = mesh or mesh_lib.make()
    if latents is None:
        start_noise = noise_lib.of_seeds(seeds, count, shape, mesh, noise)
    else:
        start_noise = noise_lib.given(latents, count, shape, mesh)
    tables = schedulers.create(scheduler, pipeline.configs["scheduler"], steps)
    if not count:
        return
    if batch_size is None:
        batch_size = largest_batch(
            pipeline,
            count,
            steps=steps,
            guidance=float(scales.max()),
            height=height,
            width=width,
            negative=negative,
            scheduler=scheduler,
            mesh=mesh,
            fsdp=fsdp,
        )
    batch = mesh_lib.round_up(batch_size, mesh)
    sampler = _sampler(pipeline, prompts, negative, bool((scales > 1).any()), mesh if fsdp else None)
    texts = pipeline_lib.encode_prompts(pipeline, sampler.texts)
    gammas = _permeability(pipeline, prompts, texts)
    params = mesh_lib.place(sampler.weights, mesh, fsdp=fsdp)

    def launch(start: int):
        rows = slice(start, min(start + batch, count))
        condition = _conditioning(pipeline, sampler, texts, gammas, rows, count, scales, batch, size, negative)
        inputs = start_noise(rows, batch), mesh_lib.split_batch(condition, mesh)
        return _sample(*sampler.static, params, tables, *inputs, sampler.strength)

    pending = launch(0)
    for start in range(0, count, batch):
        images, finite = pending
        if start + batch < count:
            pending = launch(start + batch)
        real = min(batch, count - start)
        images, finite = mesh_lib.to_host((images, finite))
        _check_finite(finite[:, :real], prompts[start : start + real])
        yield start, images[:real]


def largest_batch(
    pipeline: Pipeline,
    count: int,
    *,
    steps: int = 50,
    guidance: float = 7.5,
    height: int | None = None,
    width: int | None = None,
    negative: str = "",
    scheduler: str = "pndm",
    mesh: Mesh | None = None,
    fsdp: bool = False,
    beside: bool = False,
) -> int:
    """Pictures a batch over all devices for `count` pictures under these options of `generate`: as many as fit, but no
    more than there are or than pay (`spqr_jax.sampling.batch_size`).

    guidance: the largest of the pictures'. beside: count only memory that is free now, for a model that is in training.
    The program that is found to fit is compiled here and then run by `batches`. Raises MemoryError when a single
    picture a device does not fit, ValueError as `generate`.
    """
    mesh = mesh or mesh_lib.make()
    size = _size(pipeline, height, width)
    shape = _latent_shape(pipeline, size)
    tables = schedulers.create(scheduler, pipeline.configs["scheduler"], steps)
    sampler = _sampler(pipeline, [""], negative, guidance > 1, mesh if fsdp else None)
    weights = mesh_lib.shapes(sampler.weights, mesh, fsdp=fsdp)
    texts = jax.eval_shape(lambda: pipeline_lib.encode_prompts(pipeline, sampler.texts))
    texts = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), texts)
    gammas = _permeability(pipeline, [""], texts)

    def compiled(each: int):
        batch = each * mesh.size
        scales = np.full(1, guidance, np.float32)
        condition = _conditioning(pipeline, sampler, texts, gammas, slice(0, 1), 1, scales, batch, size, negative)
        inputs = mesh_lib.split_batch((np.zeros((batch, *shape), np.float32), condition), mesh)
        return _sample.lower(*sampler.static, weights, tables, *inputs, sampler.strength).compile()

    return mesh.size * batch_size_lib.largest(
        compiled,
        min(batch_size_lib.worthwhile(shape[0] * shape[1], mesh), -(-count // mesh.size)),
        weights=mesh_lib.bytes_each(weights),
        limit=batch_size_lib.memory_limit(mesh, beside=beside),
        what=f"{pipeline.name or 'pipeline'} at {size[0]}x{size[1]}",
    )


class _Sampler(NamedTuple):
    """What the batches of a call share.

    Attributes:
        static: the first arguments of `_sample`, which its compiled program is made for.
        weights: of "unet" and "vae", and factors of "membranes" if there are any, not yet placed.
        strength: of Safe Latent Diffusion, if it guides.
        texts: to be encoded: the prompts, the negative prompt, what Safe Latent Diffusion guides away from, and what
            membranes erase.
    """

    static: tuple[tuple[Definition, Definition], float, bool, Mesh | None, str]
    weights: Params
    strength: Strength | None
    texts: list[str]


def _sampler(pipeline: Pipeline, prompts: Sequence[str], negative: str, guided: bool, split: Mesh | None) -> _Sampler:
    attached = pipeline.attached or Attached()
    sld = attached.guidance if guided else None
    if sld and pipeline_lib.is_sdxl(pipeline):
        raise ValueError("Safe Latent Diffusion is defined for SD1.x and SD2.x; detach it to sample SDXL.")
    unet = attached_lib.add(pipeline.params["unet"], attached.delta)
    scaling, membranes = pipeline_lib.scaling_factor(pipeline), attached.membranes
    weights = {"unet": unet, "vae": pipeline.params["vae"]} | ({"membranes": membranes.factors} if membranes else {})
    transport = membranes.scaling if membranes else ""
    return _Sampler(
        ((pipeline.definitions["unet"], pipeline.definitions["vae"]), scaling, guided, split, transport),
        weights,
        jax.tree.map(np.float32, sld.strength) if sld else None,
        [*prompts, negative, *([sld.concept] if sld else []), *(membranes.targets if membranes else ())],
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _sample(
    definitions: tuple[Definition, Definition],
    scaling: float,
    guided: bool,
    split: Mesh | None,
    transport: str,
    params,
    tables,
    noise,
    condition,
    strength: Strength | None = None,
):
    """noise [B, h, w, C] -> (images_u8 [B, H, W, 3], finite [steps + 1, B]); the last row of finite is the pixels'.

    split: the mesh that params are split over, if they are: they are gathered anew at every step. transport: how
    membranes are scaled, "" without any.
    """

    def weights(component: str, turn: jax.Array) -> Params:
        if split is None:
            return params[component]
        return mesh_lib.constrain(mesh_lib.each_turn(params[component], turn), split, fsdp=False)

    def body(carry, i):
        latents, state, momentum = carry
        unet = definitions[0].bind(weights("unet", latents))
        if transport:
            membranes_lib.insert(unet, weights("membranes", latents), condition.permeability, transport)
        seen, t = tables.scale_input(latents, i), jnp.asarray(tables.timesteps)[i]
        if strength is None:
            output = guided_prediction(unet, condition, guided, seen, t)
        else:
            output, momentum = safe_prediction(unet, condition, strength, momentum, i, seen, t)
        latents, state = tables.step(state, output, i, latents)
        return (latents, state, momentum), jnp.isfinite(latents).all((1, 2, 3))

    latents = noise.astype(jnp.float32) * tables.init_noise_sigma
    momentum = None if strength is None else jnp.zeros_like(latents)
    carry: tuple[Any, ...] = (latents, tables.init_state(latents), momentum)
    (latents, *_), finite = jax.lax.scan(body, carry, jnp.arange(len(tables.timesteps)))
    vae = definitions[1].bind(weights("vae", latents))
    pixels = vae.decode(latents / scaling).astype(jnp.float32)
    finite = jnp.concatenate([finite, jnp.isfinite(pixels).all((1, 2, 3))[None]])
    # As diffusers: clip(x / 2 + 0.5), times 255, rounded half to even.
    return jnp.round(jnp.clip(pixels / 2 + 0.5, 0, 1) * 255).astype(jnp.uint8), finite


def guided_prediction(unet: Any, condition: Conditioning, guided: bool, latents: jax.Array, t: jax.Array) -> jax.Array:
    """The UNet's output under classifier-free guidance: negative + guidance * (positive - negative), float32."""
    batch = latents.shape[0]
    if not guided:
        steps = jnp.broadcast_to(t, (batch,))
        return unet(latents, steps, condition.context, condition.pooled, condition.time_ids).astype(jnp.float32)

    def twice(a, b):
        return None if a is None else jnp.concatenate([a, b])

    output = unet(
        twice(latents, latents),
        jnp.broadcast_to(t, (2 * batch,)),
        twice(condition.negative, condition.context),
        twice(condition.negative_pooled, condition.pooled),
        twice(condition.time_ids, condition.time_ids),
    ).astype(jnp.float32)
    without, with_text = jnp.split(output, 2)
    return without + condition.guidance[:, None, None, None] * (with_text - without)


def safe_prediction(
    unet: Any,
    condition: Conditioning,
    strength: Strength,
    momentum: jax.Array,
    i: jax.Array,
    latents: jax.Array,
    t: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(output, new momentum) at evaluation i under Safe Latent Diffusion: negative + guidance * (positive - negative -
    gamma), float32. Pictures whose guidance is 1 keep their plain prediction, as in diffusers."""
    assert condition.unsafe is not None
    contexts = jnp.concatenate([condition.negative, condition.context, condition.unsafe])
    steps = jnp.broadcast_to(t, (len(contexts),))
    output = unet(jnp.concatenate([latents] * 3), steps, contexts).astype(jnp.float32)
    without, with_text, unsafe = jnp.split(output, 3)
    gamma, momentum = attached_lib.safety_guidance(strength, momentum, i, without, with_text, unsafe)
    scale = condition.guidance[:, None, None, None]
    gamma = jnp.where(scale > 1, gamma, 0.0)
    return without + scale * (with_text - without - gamma), momentum


def _size(pipeline: Pipeline, height: int | None, width: int | None) -> tuple[int, int]:
    side = pipeline_lib.default_size(pipeline)
    size = (side if height is None else height, side if width is None else width)
    multiple = pipeline_lib.vae_scale(pipeline)
    if size[0] % multiple or size[1] % multiple or min(size) <= 0:
        raise ValueError(f"height and width must be positive multiples of {multiple}, found {size[0]}x{size[1]}.")
    return size


def _latent_shape(pipeline: Pipeline, size: tuple[int, int]) -> tuple[int, int, int]:
    """[h, w, C] of the latents of a picture of `size` pixels."""
    factor = pipeline_lib.vae_scale(pipeline)
    return size[0] // factor, size[1] // factor, pipeline.configs["unet"]["in_channels"]


def _guidance(guidance: float | Sequence[float], count: int) -> np.ndarray:
    scales = np.asarray(guidance, np.float32)
    scales = np.full(count, scales, np.float32) if scales.ndim == 0 else scales
    if scales.shape != (count,) or not np.isfinite(scales).all():
        raise ValueError(f"guidance must be one finite number or {count} of them, found shape {scales.shape}.")
    # Scale 1 is the prompt's own prediction: beside guided prompts, as alone, lower scales turn guidance off.
    return np.maximum(scales, 1)


def _permeability(pipeline: Pipeline, prompts: Sequence[str], texts: pipeline_lib.TextStates) -> np.ndarray | None:
    """[N, M] of N prompts and M membranes, from the states of `_Sampler.texts`; None without membranes."""
    attached = pipeline.attached or Attached()
    if attached.membranes is None:
        return None
    states, targets = np.asarray(texts.context), attached.membranes.targets
    said, wanted = (pipeline_lib.token_sets(pipeline, part) for part in (prompts, targets))
    return membranes_lib.permeability(states[: len(prompts)], states[-len(targets) :], said, wanted)


def _conditioning(pipeline, sampler, texts, gammas, rows, count, scales, batch, size, negative) -> Conditioning:
    def pad(x):
        return mesh_lib.pad_batch(x, batch)

    def repeat(x):
        return np.repeat(np.asarray(x)[None], batch, axis=0)

    context, empty = np.asarray(texts.context), np.asarray(texts.context[count])
    permeability = None if gammas is None else pad(gammas[rows])
    if texts.pooled is None:
        unsafe = repeat(context[count + 1]) if sampler.strength else None
        shared = {"unsafe": unsafe, "permeability": permeability}
        return Conditioning(pad(context[rows]), repeat(empty), pad(scales[rows]), **shared)
    pooled = np.asarray(texts.pooled)
    zeros = pipeline.configs.get("model_index", {}).get("force_zeros_for_empty_prompt", True) and not negative
    keep = 0.0 if zeros else 1.0  # SDXL's unconditional branch is all zeros, not the encoding of ""
    ids = np.array([*size, 0, 0, *size], np.float32)
    return Conditioning(
        pad(context[rows]),
        repeat(empty * keep),
        pad(scales[rows]),
        pad(pooled[rows]),
        repeat(pooled[count] * keep),
        repeat(ids),
        permeability=permeability,
    )


def _check_finite(finite: np.ndarray, prompts: Sequence[str]) -> None:
    """finite [steps + 1, B]: raise at the first step that is not."""
    if finite.all():
        return
    step, row = np.argwhere(~finite)[0]
    what = "the decoded pixels are" if step == len(finite) - 1 else f"the latents after step {step + 1} are"
    raise FloatingPointError(f"{what} not finite for prompt {prompts[row]!r}; check the weights, or use float32.")
