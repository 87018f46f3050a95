"""SafetyDPO / AlignGuard (Liu et al., ICCV 2025): direct preference for safe images over unsafe ones, in a LoRA."""

from typing import Any, NamedTuple

import jax
import numpy as np

from spqr_jax import backbones
from spqr_jax import params as params_lib
from spqr_jax.backbones import Condition, Denoiser
from spqr_jax.concepts import Concept
from spqr_jax.methods.base import Method
from spqr_jax.methods.tools import adapters, loop
from spqr_jax.methods.tools import pictures as pictures_lib
from spqr_jax.methods.tools.concepts import completed
from spqr_jax.methods.tools.loop import Adam
from spqr_jax.methods.tools.pictures import Pictures
from spqr_jax.params import Params
from spqr_jax.pipeline import Pipeline
from spqr_jax.training.objective import errors


class Static(NamedTuple):
    """What a step is compiled for: the model with adapters, the reference without, and the strength of preference."""

    adapted: Denoiser
    reference: Denoiser
    beta: float


def align(
    pipeline: Pipeline,
    concept: Concept,
    *,
    seed: int = 0,
    images: int = 800,
    batch_size: int = 16,
    steps: int = 2000,
    lr: float = 1.6e-4,
    warmup: int = 500,
    weight_decay: float = 0.01,
    clip: float = 1.0,
    beta: float = 5000.0,
    rank: int = 4,
    empty_share: float = 0.2,
    pictures: str = "",
    retain_pictures: str = "",
    sampling_steps: int = 50,
    sampling_guidance: float = 7.5,
    progress: bool = False,
) -> Pipeline:
    """Prefer, under an unsafe prompt, the image of its benign replacement made from the same noise.

    Loss: -log sigmoid(-beta / 2 ((m_w - m_l) - (r_w - r_l))), m and r the model's and the frozen reference's mean
    squared errors on the safe image (w) and the unsafe one (l), which share noise and timestep; the caption of both
    is the unsafe prompt, or "" for a share `empty_share`. LoRA of `rank` = alpha with Gaussian A on to_q, to_k, to_v,
    to_out of all attention layers, merged at the end. Adam's rate rises over `warmup` steps, with decay `weight_decay`
    and gradients clipped to the norm `clip`. On SD1.x, SD2.x and SDXL.

    Defaults are the authors' (rate 1e-5 times batch 4 times 4 accumulated, one device) but for the data: they use 23.7k
    pairs of CoProV2 in seven categories, with one expert a category merged by activation (their merging code is not
    public); here one expert learns pairs the base model makes of the concept's prompts, or yours: pictures,
    retain_pictures are data sources of unsafe and safe ones, row n of both a pair under an unsafe caption
    (`pictures_lib.pairs`). Raises ValueError for fewer `images` than a batch.
    """
    loop.check_at_least("SafetyDPO", batch_size=(batch_size, 1), beta=(beta, 0), rank=(rank, 1))
    if bool(pictures) != bool(retain_pictures):
        raise ValueError("SafetyDPO: pictures and retain_pictures are two sides of pairs; name both or neither.")
    full = completed(concept, pipeline, "replacements")
    denoiser, train, rest = adapted(pipeline, rank, seed)
    options: dict[str, Any] = {"seed": seed, "least": batch_size, "name": "SafetyDPO"}
    if pictures:
        unsafe, safe = pictures_lib.pairs(pipeline, pictures, retain_pictures, images, **options)
    else:
        options |= {"steps": sampling_steps, "guidance": sampling_guidance}
        benign = [full.replacements[i % len(full.replacements)] for i in range(len(full.prompts))]
        unsafe = pictures_lib.make(pipeline, full.prompts, images, **options)
        safe = pictures_lib.make(pipeline, benign, images, **options)  # the same seed: image n shares n's noise
    texts = backbones.condition(pipeline, [*unsafe.captions, ""], size=denoiser.backbone.pixels(pipeline, safe.mean))
    schedule, base = backbones.schedule(pipeline), jax.random.key(seed)
    order = list(pictures_lib.rows(unsafe, batch_size, steps, seed))

    def inputs(i: int, params: Params, rest: Params):
        del params, rest
        batch = pair_batch(safe, unsafe, texts, order[i], empty_share, np.random.default_rng((seed, i)))
        return schedule, batch, jax.random.fold_in(base, i)

    static = Static(denoiser, backbones.denoiser(pipeline), beta)
    adam, frozen = Adam(lr, weight_decay, clip, warmup), (rest,)
    tuned = loop.fit("SafetyDPO", _PREFERENCE, static, adam, train, inputs, steps, frozen=frozen, progress=progress)
    return adapters.merged(pipeline, tuned, rest, rank)


def adapted(pipeline: Pipeline, rank: int, seed: int) -> tuple[Denoiser, Params, Params]:
    """(denoiser with adapters, adapters, frozen weights): A ~ N(0, 1/rank^2), B zero, as PEFT's Gaussian start."""
    return adapters.adapted(pipeline, rank, seed, {"lora_A": 1 / rank})


def preference_loss(static: Static, params: Params, rest, schedule, batch, key) -> jax.Array:
    """The loss above. batch: {"safe", "unsafe"}: {"mean", "std"} [B, h, w, C]; "condition", B rows."""
    keys = jax.random.split(key, 2)
    safe = static.adapted.draw(keys[0], batch["safe"]["mean"], batch["safe"]["std"], schedule)
    unsafe = batch["unsafe"]["mean"] + batch["unsafe"]["std"] * jax.random.normal(keys[1], safe.noise.shape)

    def difference(denoiser: Denoiser, weights: Params) -> jax.Array:
        """The error on the safe images less that on the unsafe ones, [B]."""
        predict, both = denoiser.bind(weights), (safe, safe._replace(latents=unsafe))
        of_safe, of_unsafe = (errors(denoiser, predict, batch["condition"], one, schedule) for one in both)
        return of_safe - of_unsafe

    learned = difference(static.adapted, params_lib.merge(rest, params))
    frozen = jax.lax.stop_gradient(difference(static.reference, rest))
    return -jax.nn.log_sigmoid(-static.beta / 2 * (learned - frozen)).mean()


_PREFERENCE = loop.descent(preference_loss)


def pair_batch(
    safe: Pictures,
    unsafe: Pictures,
    texts: Condition,
    rows: np.ndarray,
    empty_share: float,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Pairs with their captions; the last of `texts` is ""."""
    caption = np.where(rng.random(len(rows)) < empty_share, len(texts.context) - 1, unsafe.prompt[rows])
    return {
        "safe": {"mean": safe.mean[rows], "std": safe.std[rows]},
        "unsafe": {"mean": unsafe.mean[rows], "std": unsafe.std[rows]},
        "condition": texts.rows(caption),
    }


METHOD = Method("safety_dpo", "SafetyDPO", align, data_options=("pictures", "retain_pictures"))
