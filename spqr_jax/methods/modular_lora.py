"""Modular LoRA (Safety Alignment Backfires, arXiv 2412.00357): a safety adapter kept apart from benign fine-tuning."""

from spqr_jax import backbones
from spqr_jax.concepts import Concept
from spqr_jax.methods.base import Method
from spqr_jax.methods.tools import loop, low_rank, negative_guidance
from spqr_jax.methods.tools.concepts import checked
from spqr_jax.methods.tools.loop import Adam
from spqr_jax.methods.tools.low_rank import Added
from spqr_jax.methods.tools.negative_guidance import Course
from spqr_jax.pipeline import Pipeline
from spqr_jax.sampling import attached
from spqr_jax.sampling.attached.delta import Delta, add


def align(
    pipeline: Pipeline,
    concept: Concept,
    *,
    seed: int = 0,
    merged: bool = False,
    rank: int = 4,
    alpha: float = 4.0,
    steps: int = 1500,
    lr: float = 1e-4,
    eta: float = 1.0,
    batch_size: int = 1,
    sampling_steps: int = 50,
    sampling_guidance: float = 3.0,
    progress: bool = False,
) -> Pipeline:
    """Train an adapter dW_safe on the UNet's attention projections with ESD's loss, and attach it for generation.

    The weights W0 stay as they are: benign fine-tuning trains them without dW_safe, and images are made with
    W0 + dW_safe + dW_ft, both at full strength (paper, section 5). eta is that of ESD's loss; the adapter has `rank`
    and is scaled by alpha / rank. `merged` adds dW_safe to the weights instead, so
    that fine-tuning starts from the aligned model: the arm to beat.

    No official code is known. Objective and rates are those of a third party's reproduction: rank 4, alpha 4, 1500
    steps at 1e-4 of `spqr_jax.methods.esd`'s loss, AdamW with decay 0.01. Works on SD1.x, SD2.x and SDXL.
    """
    loop.check_at_least("Modular LoRA", batch_size=(batch_size, 1), rank=(rank, 1))
    checked(concept, pipeline)
    backbone, build = backbones.of(pipeline), Added(alpha / rank)
    weights, region = backbone.weights(pipeline), backbone.require("lora", "Modular LoRA")
    adapter = negative_guidance.fit(
        "Modular LoRA",
        pipeline,
        concept,
        build,
        weights,
        low_rank.create(weights, region, rank=rank, seed=seed, name="Modular LoRA"),
        Adam(lr, weight_decay=0.01),
        Course(seed, steps, eta, batch_size, sampling_steps, sampling_guidance, progress),
    )
    kernels = loop.on_host(low_rank.delta(adapter, build.scale))
    if merged:
        return backbone.with_weights(pipeline, loop.on_host(add(weights, kernels)))
    before = attached.find(pipeline, Delta)
    return attached.attach(pipeline, Delta(low_rank.together(before.kernels if before else None, kernels)))


METHOD = Method("modular_lora", "Modular LoRA", align)
