"""One call of the sampler: checked options, encoded texts, and the contributions of attachments."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from spqr_jax import backbones, schedulers
from spqr_jax.backbones import Backbone, Condition
from spqr_jax.devices import mesh as mesh_lib
from spqr_jax.pipeline import Pipeline
from spqr_jax.sampling import noise as noise_lib
from spqr_jax.sampling.attached.base import Prepared
from spqr_jax.sampling.guidance import Guided
from spqr_jax.sampling.sampler import Batch, Program


class Sampling(NamedTuple):
    """The options of sampling.

    Attributes:
        steps: number of denoising steps.
        guidance: scale of guidance, one number or one for each image. It is that of classifier-free guidance, and at 1
            or below there is none, as in diffusers; a guidance-distilled model (FLUX.1 dev) reads it.
        height, width: pixels; None: the size that the denoiser was trained at.
        negative: negative prompt.
        scheduler: one of `spqr_jax.schedulers.NAMES`; "flow_euler" for flow transformers.
        max_sequence_length: tokens of a text for T5; None: the backbone's usual number.
    """

    steps: int = 50
    guidance: float | Sequence[float] = 7.5
    height: int | None = None
    width: int | None = None
    negative: str = ""
    scheduler: str = "pndm"
    max_sequence_length: int | None = None


class Call(NamedTuple):
    """Everything that the batches of one call share: the program, its weights (not yet placed), all N conditions."""

    program: Program
    tables: Any
    weights: dict[str, Any]
    text: Condition  # N rows
    negative: Condition  # one row
    scales: np.ndarray  # [N]
    attached: tuple[Prepared, ...]

    @property
    def numbers(self) -> tuple[Any, ...]:
        return tuple(one.numbers for one in self.attached)

    def batch(self, rows: slice, size: int) -> Batch:
        """Inputs of the images in `rows`. The last row is repeated up to `size`, and so is a single row for all."""

        def chosen(x: Any) -> np.ndarray:
            x = np.asarray(x)
            return np.repeat(x, size, axis=0) if len(x) == 1 else mesh_lib.pad_batch(x[rows], size)

        given, rows_of = Guided(self.text, self.negative, self.scales), tuple(one.rows for one in self.attached)
        return jax.tree.map(chosen, Batch(given, rows_of))


def prepare(
    pipeline: Pipeline,
    prompts: Sequence[str],
    how: Sampling,
    scales: np.ndarray,
    tables: Any,
    split: Mesh | None,
    *,
    shapes: bool = False,
) -> Call:
    """Encode all texts and let every attachment prepare.

    tables: from `tables_of`. split: the mesh that weights are split over, or None. shapes: have zeros in the place of
    text states, so that nothing is computed.
    """
    backbone, count = backbones.of(pipeline), len(prompts)
    pipeline = backbone.with_length(pipeline, how.max_sequence_length)
    read, scales = backbone.guidance(pipeline, scales)
    guided = bool((scales > 1).any())
    acting = [one for one in pipeline.attached if guided or not one.needs_guidance]
    texts = [*prompts, how.negative, *(text for one in acting for text in one.texts)]
    condition = _condition(backbone, pipeline, texts, size_of(pipeline, how), count, shapes)
    said = condition.rows(slice(0, count)).guided(read)
    weights, prepared, first = backbone.weights(pipeline), [], count + 1
    for one in acting:
        own, first = condition.rows(slice(first, first + len(one.texts))), first + len(one.texts)
        weights = one.changed(weights)
        prepared.append(one.prepare(pipeline, prompts, said, own))
    acts = tuple(one for one in prepared if one.act is not None)
    kinds = tuple(one.act for one in acts)
    autoencoder, decoder = pipeline.params[backbone.autoencoder], pipeline.definitions[backbone.autoencoder]
    return Call(
        Program(backbones.denoiser(pipeline), decoder, backbone.scaling(pipeline), guided, split, kinds),
        tables,
        {"denoiser": weights, "autoencoder": autoencoder, "attached": tuple(one.weights for one in acts)},
        said,
        condition.rows(slice(count, count + 1)),
        scales,
        acts,
    )


def _condition(
    backbone: Backbone, pipeline: Pipeline, texts: list[str], size: tuple[int, int], negative: int, shapes: bool
) -> Condition:
    if not shapes:
        return backbones.condition(pipeline, texts, size=size, unconditional=(negative,))
    told = jax.eval_shape(lambda: backbone.condition(pipeline, texts, size, (negative,)))
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), told)


def start_noise(pipeline: Pipeline, count: int, how: Sampling, seeds: Any, latents: Any, noise: str, mesh: Mesh):
    """A function (numbers of images, B) -> the noise [B, h, w, C] that these images start from."""
    shape = backbones.of(pipeline).latent_shape(pipeline, size_of(pipeline, how))
    if latents is None:
        return noise_lib.of_seeds(seeds, count, shape, mesh, noise)
    return noise_lib.given(latents, count, shape, mesh)


def tables_of(pipeline: Pipeline, how: Sampling) -> Any:
    """The scheduler's tables. Raises ValueError for an unknown scheduler or a number of steps that it does not take."""
    spacing = backbones.of(pipeline).spacing(pipeline, size_of(pipeline, how))
    return schedulers.create(how.scheduler, pipeline.configs["scheduler"], how.steps, spacing)


def size_of(pipeline: Pipeline, how: Sampling) -> tuple[int, int]:
    """(height, width) in pixels. Raises ValueError for a side that is no multiple of `Backbone.multiple`."""
    backbone = backbones.of(pipeline)
    side, multiple = backbone.side(pipeline), backbone.multiple(pipeline)
    size = (side if how.height is None else how.height, side if how.width is None else how.width)
    if size[0] % multiple or size[1] % multiple or min(size) <= 0:
        raise ValueError(f"height and width must be positive multiples of {multiple}, found {size[0]}x{size[1]}.")
    return size


def guidance_scales(guidance: float | Sequence[float], count: int) -> np.ndarray:
    """The guidance scale of every image, float32 [count]. Raises ValueError for another number of scales."""
    scales = np.asarray(guidance, np.float32)
    scales = np.full(count, scales, np.float32) if scales.ndim == 0 else scales
    if scales.shape != (count,) or not np.isfinite(scales).all():
        raise ValueError(f"guidance must be one finite number or {count} of them, found shape {scales.shape}.")
    return scales
