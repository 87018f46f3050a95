"""From texts to images, batch by batch over all devices. The attachments of the pipeline take part."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from spqr_jax import backbones
from spqr_jax.devices import memory
from spqr_jax.devices import mesh as mesh_lib
from spqr_jax.pipeline import Pipeline
from spqr_jax.sampling import batch_size as batch_size_lib
from spqr_jax.sampling import call as call_lib
from spqr_jax.sampling.call import Call, Sampling
from spqr_jax.sampling.sampler import check_finite, sample


def generate(
    pipeline: Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int] | int,
    *,
    batch_size: int | None = None,
    **options: Any,
) -> np.ndarray:
    """Images for prompts: images_u8 uint8 [N, height, width, 3] RGB.

    options: arguments of `batches` and fields of `Sampling`. Raises ValueError for arguments that do not fit each
    other. Raises FloatingPointError that names step and prompt if latents or pixels are not finite.
    """
    batch_size = batch_size and min(batch_size, len(prompts) or 1)
    parts = [images for _, images in batches(pipeline, prompts, seeds, batch_size=batch_size, **options)]
    if parts:
        return np.concatenate(parts)
    size = call_lib.size_of(pipeline, Sampling(height=options.get("height"), width=options.get("width")))
    return np.zeros((0, *size, 3), np.uint8)


def batches(
    pipeline: Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int] | int,
    *,
    latents: np.ndarray | None = None,
    noise: str = "jax",
    mesh: Mesh | None = None,
    batch_size: int | None = None,
    fsdp: bool = False,
    **sampling: Any,
) -> Iterator[tuple[int, np.ndarray]]:
    """Images for prompts, batch by batch: yields (index of the first image, images_u8 [B, height, width, 3]).

    Args:
        prompts: N texts.
        seeds: N seeds in 0..2**32-1, one for each image; or one seed, then image i uses fold_in(key(seed), i).
        latents: initial noise [N, H/f, W/f, C], standard normal, in place of the noise of the seeds.
        noise: "jax", or "torch" for the noise of torch.Generator("cpu").manual_seed(seed).
        mesh: devices (default: all).
        batch_size: images in a batch, over all devices (default: `largest_batch`). It does not change the noise.
        fsdp: split the weights over the devices, for models that do not fit whole. They are gathered at every step.
        sampling: fields of `Sampling`.

    Attachments of the pipeline act here (`spqr_jax.sampling.attached`). The next batch is computed while the caller
    works on this one. A batch of fewer than `batch_size` images is padded, so that all batches run the same program,
    also those of a part of a sweep. Raises as `generate`.
    """
    how, mesh = Sampling(**sampling), mesh or mesh_lib.make()
    pipeline = backbones.on(pipeline, mesh)
    scales, tables = call_lib.guidance_scales(how.guidance, len(prompts)), call_lib.tables_of(pipeline, how)
    start = call_lib.start_noise(pipeline, len(prompts), how, seeds, latents, noise, mesh)
    largest = how._replace(guidance=float(scales.max(initial=1)))
    size = _batch_size(pipeline, len(prompts), largest, batch_size, mesh, fsdp)
    if prompts:
        call = call_lib.prepare(pipeline, prompts, how, scales, tables, mesh if fsdp else None)
        yield from _one_ahead(call, prompts, start, size, mesh, fsdp)


def _batch_size(pipeline: Pipeline, count: int, how: Sampling, wanted: int | None, mesh: Mesh, fsdp: bool) -> int:
    """Images a batch: as wanted, else the largest that fits, as a multiple of the number of devices."""
    if wanted is not None and wanted < 1:
        raise ValueError(f"batch_size must be at least 1, found {wanted}.")
    if wanted is None and count:
        wanted = largest_batch(pipeline, count, mesh=mesh, fsdp=fsdp, **how._asdict())
    return mesh_lib.round_up(wanted or 1, mesh)


def _one_ahead(
    call: Call, prompts: Sequence[str], start: Any, size: int, mesh: Mesh, fsdp: bool
) -> Iterator[tuple[int, np.ndarray]]:
    """The batches of a call, each launched before the one before it is handed out."""
    weights = mesh_lib.place(call.weights, mesh, fsdp=fsdp)

    def launch(first: int):
        rows = slice(first, min(first + size, len(prompts)))
        inputs = mesh_lib.split_batch(call.batch(rows, size), mesh)
        return sample(call.program, weights, call.tables, start(rows, size), inputs, call.numbers)

    pending = launch(0)
    for first in range(0, len(prompts), size):
        images, finite = pending
        if first + size < len(prompts):
            pending = launch(first + size)
        real = min(size, len(prompts) - first)
        images, finite = mesh_lib.to_host((images, finite))
        check_finite(finite[:, :real], prompts[first : first + real])
        yield first, images[:real]


def largest_batch(
    pipeline: Pipeline,
    count: int,
    *,
    mesh: Mesh | None = None,
    fsdp: bool = False,
    beside: bool = False,
    **sampling: Any,
) -> int:
    """The batch size over all devices for `count` images: as many as fit into memory.

    It is at most `count`, and at most the size beyond which a larger batch saves no time (`batch_size.worthwhile`). Of
    those it is the smallest that needs no batch more (`batch_size.even`).
    sampling: fields of `Sampling`; its guidance is the largest scale of all images. beside: count only memory that is
    free now, for a model that is in training. The program that fits is compiled here, and `batches` runs it. Raises
    MemoryError if a single image on each device does not fit, and ValueError as `generate`.
    """
    how, mesh = Sampling(**sampling), mesh or mesh_lib.make()
    pipeline = backbones.on(pipeline, mesh)
    size = call_lib.size_of(pipeline, how)
    shape = backbones.of(pipeline).latent_shape(pipeline, size)
    scales, tables = call_lib.guidance_scales(how.guidance, 1), call_lib.tables_of(pipeline, how)
    call = call_lib.prepare(pipeline, [""], how, scales, tables, mesh if fsdp else None, shapes=True)
    weights = mesh_lib.shapes(call.weights, mesh, fsdp=fsdp)

    def compiled(each: int):
        batch = each * mesh.size
        noise = np.zeros((batch, *shape), np.float32)
        noise, inputs = mesh_lib.split_batch((noise, call.batch(slice(0, 1), batch)), mesh)
        return sample.lower(call.program, weights, call.tables, noise, inputs, call.numbers).compile()

    return mesh.size * batch_size_lib.largest(
        compiled,
        batch_size_lib.even(-(-count // mesh.size), batch_size_lib.worthwhile(shape[0] * shape[1], mesh)),
        weights=mesh_lib.bytes_each(weights),
        limit=memory.memory_limit(mesh, beside=beside),
        what=f"{pipeline.name or 'pipeline'} at {size[0]}x{size[1]}",
    )
