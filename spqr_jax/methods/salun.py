"""SalUn, Saliency Unlearning (Fan et al., ICLR 2024): relabel, and train only the weights salient for forgetting."""

import jax
import jax.numpy as jnp

from spqr_jax import backbones
from spqr_jax.backbones import Condition, Denoiser
from spqr_jax.concepts import Concept
from spqr_jax.methods.base import Method
from spqr_jax.methods.tools import element_mask, gradients, loop, parts, relabelling
from spqr_jax.methods.tools import pictures as pictures_lib
from spqr_jax.methods.tools.relabelling import Task, Weighted
from spqr_jax.params import Params
from spqr_jax.pipeline import Pipeline


def align(
    pipeline: Pipeline,
    concept: Concept,
    *,
    seed: int = 0,
    images: int = 800,
    batch_size: int = 8,
    steps: int = 100,
    lr: float = 1e-5,
    alpha: float = 0.1,
    train: str = "full",
    share: float = 0.5,
    mask_steps: int = 100,
    mask_guidance: float = 7.5,
    pictures: str = "",
    retain_pictures: str = "",
    sampling_steps: int = 50,
    sampling_guidance: float = 7.5,
    progress: bool = False,
) -> Pipeline:
    """Relabel images of the concept, within the half of the UNet's weights that forgetting it needs most.

    Loss (paper eq. 6): MSE(eps(x_t, c), sg[eps(x_t, c')]) + alpha * denoising loss on benign images. Mask (eq. 4):
    the `share` of all UNet weights with the largest |sum over batches of the gradient of the forgetting objective|,
    ranked over the whole UNet; that objective is the negated denoising loss of the guided prediction
    (1 + w) eps(x_t, c) - w eps(x_t, ""), w = `mask_guidance`, as in the authors' code (0: the plain prediction), and
    `mask_steps` is the number of its batches.

    Defaults are the authors' for nudity: 800 images to forget and 800 to retain, one epoch of each in batches of 8.
    pictures, retain_pictures: your own, as `relabelling.task` takes them. train: "full" or "xattn" (attn2 alone), the
    two that the authors have. The mask acts on gradients and updates, so
    what it leaves out stays bit-identical. Unlike the code, which reads its images in order, every epoch here is a
    new permutation. Raises ValueError for SDXL and for fewer `images` than a batch.
    """
    METHOD.check_backbone(pipeline)
    if train not in ("full", "xattn"):
        raise ValueError(f'SalUn: train must be "full" or "xattn", found {train!r}.')
    loop.check_at_least("SalUn", mask_steps=(mask_steps, 1))
    element_mask.check_share("SalUn: share", share)
    data = relabelling.task(
        "SalUn",
        pipeline,
        concept,
        images=images,
        batch_size=batch_size,
        seed=seed,
        pictures=pictures,
        retain_pictures=retain_pictures,
        sampling_steps=sampling_steps,
        sampling_guidance=sampling_guidance,
    )
    backbone = backbones.of(pipeline)
    weights = backbone.weights(pipeline)
    mask = saliency(pipeline, data, mask_guidance, mask_steps, batch_size, seed, share, progress)
    return relabelling.fit(
        "SalUn",
        pipeline,
        weights,
        parts.everything(weights) if train == "full" else parts.trained(backbone, weights, "esd-x", "SalUn"),
        data,
        Weighted(1.0, alpha),
        lr=lr,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        mask=mask,
        progress=progress,
    )


def saliency(
    pipeline: Pipeline,
    data: Task,
    guidance: float,
    steps: int,
    batch_size: int,
    seed: int,
    share: float,
    progress: bool = False,
) -> Params:
    """The element mask over the UNet: the `share` of weights with the largest absolute summed gradient."""
    empty = backbones.condition(pipeline, [""])
    schedule, base = backbones.schedule(pipeline), jax.random.key(seed + 1)
    order = list(pictures_lib.rows(data.forget, batch_size, steps, seed + 1))
    weights, denoiser = backbones.of(pipeline).weights(pipeline), backbones.denoiser(pipeline)

    def inputs(i: int):
        return schedule, data.forget.batch(order[i]), empty, jnp.float32(guidance), jax.random.fold_in(base, i)

    total = gradients.summed(
        "SalUn sum of gradients",
        forgetting_objective,
        denoiser,
        weights,
        inputs,
        steps,
        absolute=False,
        progress=progress,
    )
    return element_mask.top(jax.tree.map(jnp.abs, total), share)


def forgetting_objective(
    denoiser: Denoiser, params: Params, schedule, batch, empty: Condition, guidance, key
) -> jax.Array:
    """-MSE(target, (1 + w) prediction under the caption - w prediction under "", one row)."""
    drawn = denoiser.draw(key, batch["mean"], batch["std"], schedule)
    noisy, predict = denoiser.mix(schedule, drawn), denoiser.bind(params)
    target = denoiser.backbone.noising.target(denoiser.prediction, schedule, drawn)
    nothing = jax.tree.map(lambda one, many: jnp.broadcast_to(one, many.shape), empty, batch["condition"])
    without = predict(noisy, drawn.times, nothing)
    guided = (1 + guidance) * predict(noisy, drawn.times, batch["condition"]) - guidance * without
    return -jnp.square(guided.astype(jnp.float32) - target).mean()


METHOD = Method("salun", "SalUn", align, backbones=("sd",), data_options=("pictures", "retain_pictures"))
