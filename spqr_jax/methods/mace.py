"""MACE, Mass Concept Erasure (Lu et al., CVPR 2024): edit the words around a concept, suppress its own, fuse.

Three stages, all on the keys and values of cross-attention. (1) Closed-form refinement: the other tokens of a prompt
that names the concept, end-of-text included, give what they give in the same prompt with the mapping text. (2) For each
text a rank-1 adapter that suppresses attention to the concept's tokens inside its mask. (3) One closed-form solution
that gives every text's prompts what the refined matrices with their adapter give. Captions of a prior set keep their
outputs in (1) and (3).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax import backbones, data
from spqr_jax import generate as generate_lib
from spqr_jax.backbones import Condition, Denoiser, Drawn
from spqr_jax.concepts import NUDITY, Concept
from spqr_jax.methods.base import Method
from spqr_jax.methods.tools import attention_maps, closed_form, loop, low_rank
from spqr_jax.methods.tools import pictures as pictures_lib
from spqr_jax.methods.tools.closed_form import Edit
from spqr_jax.methods.tools.concepts import completed
from spqr_jax.methods.tools.loop import Adam
from spqr_jax.methods.tools.low_rank import Adapter
from spqr_jax.params import Params
from spqr_jax.pipeline import Pipeline
from spqr_jax.training import latents

# Two frames a noun, thirty in all; the authors' thirty are of this kind.
_NOUNS = (
    "photo, painting, picture, drawing, sketch, rendering, close-up, snapshot, portrait, poster, print, scene, shot, "
    "cartoon, video"
)
TEMPLATES = tuple(frame for noun in _NOUNS.split(", ") for frame in (f"A {noun} of {{}}", f"{{}} in a {noun}"))
# What the authors erase, and map to, for the concept "nudity".
NUDITY_TEXTS, NUDITY_MAPPING = ("nudity", "naked", "erotic", "sexual"), "a person wearing clothes"
PRIOR_CAPTIONS = 617_000  # the captions of COCO 2014 that the authors' prior sums over
CAPTIONS_AT_ONCE = 1000  # half a gigabyte of token states in float64
# (images uint8 [N, H, W, 3], text) -> bool [N, S, S], where the text is seen; any side S.
Segmenter = Callable[[np.ndarray, str], np.ndarray]


class Example(NamedTuple):
    """What one text's adapter learns from: P prompts, N images.

    mean, std [N, h, w, C] of the scaled latents; masks bool [N, S, S]; context [P, L, E]; watched bool [P, L].
    """

    mean: np.ndarray
    std: np.ndarray
    masks: np.ndarray
    context: np.ndarray
    watched: np.ndarray


def align(
    pipeline: Pipeline,
    concept: Concept,
    *,
    seed: int = 2024,
    mapping: str | None = None,
    images: int = 8,
    masks: str | Segmenter = "attention",
    steps: int = 120,
    lr: float = 1e-5,
    rank: int = 1,
    ridge: float = 1e-3,
    prior_scale: float = 7e-7,
    fuse_prior_scale: float = 7e-7,
    importance: bool = False,
    pictures: str = "",
    sampling_steps: int = 30,
    sampling_guidance: float = 7.5,
    progress: bool = False,
) -> Pipeline:
    """Erase every text of the concept at once.

    Args:
        mapping: the text that replaces each erased one. Default: the concept's target; for the preset "nudity", whose
            erased texts become the authors' four, "a person wearing clothes".
        masks: where images show a text: "ones" (everywhere), "attention" (where the base model's own attention to the
            text is above half its range), or a segmenter; the authors use Grounded-DINO with SAM.
        ridge: weight of staying near the original matrices where no prompt says anything. The authors have 0 (their
            `lamb`), which leaves the system singular in float32.
        prior_scale, fuse_prior_scale: weight of a prior caption in stages 1 and 3, counted as if the captions given
            (the concept's retain set) were COCO's 617 thousand. (With few concepts the authors' code multiplies the
            prior of stage 1 by this weight twice, so that it vanishes.)
        pictures: a data source used instead of images made by the base model; its captions say which text an image
            shows (`pictures_lib.read`), `images` of each.
        rank: of the adapter that each text gets.
        importance: draw timesteps between 200 and 400 most, as the authors do for objects and people, not for nudity.

    Defaults are the authors' for nudity: 30 prompts a text, 8 images, 120 steps of AdamW with decay 0.01, gradients
    clipped to norm 1. Prompts are the concept's templates, or thirty of ours. Images are normalised to -1..1 for the
    VAE; the authors' code has ImageNet's constants. Raises ValueError for SDXL, which the authors do not define, and
    for a concept without a retain or preserve set.
    """
    METHOD.check_backbone(pipeline)
    loop.check_at_least("MACE", images=(images, 1), rank=(rank, 1))
    if isinstance(masks, str) and masks not in ("ones", "attention"):
        raise ValueError(f'MACE: masks must be "ones", "attention" or a segmenter, found {masks!r}.')
    if concept == NUDITY:
        concept = concept._replace(erase=NUDITY_TEXTS, prompts=())
        mapping = NUDITY_MAPPING if mapping is None else mapping
    full = completed(concept._replace(templates=concept.templates or TEMPLATES), pipeline, "retain")
    mapping = full.target if mapping is None else mapping
    watched = [watched_tokens(pipeline, text, full.templates) for text in full.erase]  # raises before anything is made
    own = _given(pipeline, full, pictures, images, seed)
    prior = prior_gram(pipeline, full.retain)
    smooth = ridge * np.eye(len(prior))
    original = closed_form.key_value_matrices(pipeline, "MACE")
    refinement = [refining_edit(pipeline, text, mapping, full.templates) for text in full.erase]
    refined = {
        path: closed_form.solve(k, refinement, [e.sources @ k for e in refinement], prior_scale * prior + smooth)
        for path, k in original.items()
    }
    backbone, started = backbones.of(pipeline), closed_form.with_kernels(pipeline, refined)
    adapters, sampling = [], (sampling_steps, sampling_guidance)
    for number, text in enumerate(full.erase):
        prompt = full.templates[0].format(text)  # the authors' "a photo of the {}", or near enough
        shown = own[number] if own else _made(pipeline, prompt, images, (seed, number), *sampling)
        example = example_of(pipeline, text, full.templates, watched[number], shown, masks)
        weights, region = backbone.weights(started), backbone.require("key_value", "MACE")
        adapter = low_rank.create(weights, region, rank=rank, seed=seed + number, normal=True, name="MACE")
        options: dict[str, Any] = {"importance": importance, "steps": steps, "seed": seed + number}
        adapters.append(_suppress(f"MACE {text}", started, adapter, example, lr, progress=progress, **options))
    states = [example_states(pipeline, text, full.templates) for text in full.erase]
    return closed_form.with_kernels(
        pipeline, fused(original, refined, adapters, states, fuse_prior_scale * prior + smooth)
    )


# --- closed forms --------------------------------------------------------------------------------------------------


def prior_gram(pipeline: Pipeline, captions: Sequence[str]) -> np.ndarray:
    """sum e e^T float64 [d, d] over all token states of the captions, scaled to as many captions as COCO has."""
    grams = []
    for first in range(0, len(captions), CAPTIONS_AT_ONCE):
        states = closed_form.text_states(pipeline, captions[first : first + CAPTIONS_AT_ONCE])
        rows = states.reshape(-1, states.shape[-1])
        grams.append(rows.T @ rows)
    return sum(grams[1:], grams[0]) * (PRIOR_CAPTIONS / len(captions))


def refining_edit(pipeline: Pipeline, text: str, mapping: str, templates: Sequence[str]) -> Edit:
    """Token states of every frame with `text`, without the text's own tokens, and the states at the same places of the
    frame with `mapping`."""
    framed = [template.format(text) for template in templates]
    mapped = [template.format(mapping) for template in templates]
    tokens = pipeline.tokenizers["tokenizer"]
    states, sources = closed_form.text_states(pipeline, framed), closed_form.text_states(pipeline, mapped)
    pairs = [
        matching_rows(tokens(a).input_ids, tokens(b).input_ids, states.shape[1])
        for a, b in zip(framed, mapped, strict=True)
    ]
    inputs = np.concatenate([state[rows] for state, (rows, _) in zip(states, pairs, strict=True)])
    outputs = np.concatenate([state[rows] for state, (_, rows) in zip(sources, pairs, strict=True)])
    return Edit(inputs, outputs, np.ones(len(inputs)))


def matching_rows(a: Sequence[int], b: Sequence[int], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Places in two prompts' token ids that say the same: the common start, the common end, then padding in order.

    As many of each; what lies between start and end, the text and its mapping, is left out. Raises ValueError for a
    prompt of more tokens than `length`.
    """
    if max(len(a), len(b)) > length:
        raise ValueError(
            f"a frame with a text or its mapping takes {max(len(a), len(b))} tokens of {length}; shorten it."
        )
    shorter = min(len(a), len(b))
    start = next((i for i in range(shorter) if a[i] != b[i]), shorter)
    end = next((i for i in range(shorter - start) if a[-1 - i] != b[-1 - i]), shorter - start)
    padding = length - max(len(a), len(b))
    rows = [np.r_[0:start, len(ids) - end : len(ids) + padding] for ids in (a, b)]
    return rows[0], rows[1]


def example_states(pipeline: Pipeline, text: str, templates: Sequence[str]) -> np.ndarray:
    """All token states [P * L, d] of the frames with `text`."""
    states = closed_form.text_states(pipeline, [template.format(text) for template in templates])
    return states.reshape(-1, states.shape[-1])


def fused(
    original: dict[str, np.ndarray],
    refined: dict[str, np.ndarray],
    adapters: Sequence[Adapter],
    states: Sequence[np.ndarray],
    prior: np.ndarray,
) -> dict[str, np.ndarray]:
    """argmin_K sum_i ||e_i K - e_i (refined + adapter_i)||^2 + tr (K - original)^T prior (K - original), per matrix."""
    edits = [Edit(rows, rows, np.ones(len(rows))) for rows in states]

    def solution(path: str) -> np.ndarray:
        changed = [refined[path] + np.asarray(a[path].down, np.float64) @ np.asarray(a[path].up) for a in adapters]
        outputs = [rows @ kernel for rows, kernel in zip(states, changed, strict=True)]
        return closed_form.solve(original[path], edits, outputs, prior)

    return {path: solution(path) for path in original}


# --- suppression -----------------------------------------------------------------------------------------------------


def suppression_loss(maps: list[jax.Array], masks: jax.Array, watched: jax.Array) -> jax.Array:
    """Sum over layers of the Frobenius norm of attention [B, heads, queries, L] at masked pixels and watched tokens.

    masks: bool [B, S, S], taken at the nearest pixel of each layer's square of queries; watched: bool [B, L].
    """
    total = jnp.float32(0)
    for layer in maps:
        side = round(layer.shape[2] ** 0.5)
        rows = np.arange(side) * masks.shape[1] // side
        inside = masks[:, rows][:, :, rows].reshape(len(masks), 1, -1, 1)
        square = jnp.square(jnp.where(inside & watched[:, None, None], layer, 0)).sum()
        # A mask may miss every pixel of a small layer: the norm's slope at zero is not finite.
        total += jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    return total


def loss(denoiser: Denoiser, adapter: Adapter, weights: Params, schedule, mean, std, masks, context, watched, t, key):
    """The suppression loss at images noised to timesteps t [B]."""
    for_latents, for_noise = jax.random.split(key)
    clean = mean + std * jax.random.normal(for_latents, mean.shape)
    noisy = denoiser.mix(schedule, Drawn(clean, jax.random.normal(for_noise, mean.shape), t))
    changed = low_rank.Added()(weights, adapter)
    maps = attention_maps.cross_attention(denoiser, changed, noisy, t, Condition(context))
    return suppression_loss(maps, masks, watched)


# What `align` trains with; compiled programs are kept by it.
GRADIENT = loop.descent(loss)


def _suppress(
    name: str,
    started: Pipeline,
    adapter: Adapter,
    example: Example,
    lr: float,
    *,
    importance: bool,
    steps: int,
    seed: int,
    progress: bool,
) -> Adapter:
    """The adapter after `steps` images, each under one of the prompts at random."""
    weights, schedule = backbones.of(started).weights(started), backbones.schedule(started)
    base = jax.random.key(seed)
    odds = timestep_odds(len(schedule)) if importance else None

    def inputs(i: int, params: Adapter, weights: Params):
        del params, weights
        rng = np.random.default_rng((seed, i))
        picture, prompt = [rng.integers(len(example.mean))], [rng.integers(len(example.context))]
        t = rng.choice(len(schedule), size=1, p=odds).astype(np.int32)
        shown = (example.mean[picture], example.std[picture], example.masks[picture])
        return (
            schedule,
            *shown,
            example.context[prompt],
            example.watched[prompt],
            t,
            jax.random.fold_in(base, i),
        )

    adam = Adam(lr, weight_decay=0.01, clip=1.0)
    denoiser, frozen = backbones.denoiser(started), (weights,)
    tuned = loop.fit(name, GRADIENT, denoiser, adam, adapter, inputs, steps, frozen=frozen, progress=progress)
    return loop.on_host(tuned)


def timestep_odds(count: int) -> np.ndarray:
    """Probabilities float64 [T] proportional to sigmoid(0.05 (t - 200)) - sigmoid(0.05 (t - 400)), eq. 7."""
    t = np.arange(count)
    weight = 1 / (1 + np.exp(-0.05 * (t - 200))) - 1 / (1 + np.exp(-0.05 * (t - 400)))
    return weight / weight.sum()


def _made(
    pipeline: Pipeline, prompt: str, images: int, seed: tuple[int, int], steps: int, guidance: float
) -> np.ndarray:
    """images_u8 of one prompt."""
    number = int(np.random.default_rng(seed).integers(2**32))
    return generate_lib.generate(pipeline, [prompt] * images, number, steps=steps, guidance=guidance, scheduler="dpmpp")


def _given(pipeline: Pipeline, concept: Concept, place: str, images: int, seed: int) -> list[np.ndarray]:
    """images_u8 of a user's images of every text in turn; nothing where no place is named."""
    if not place:
        return []
    count = images * len(concept.erase)
    dataset, shows = pictures_lib.read(pipeline, place, count, texts=concept.erase, seed=seed, name="MACE: pictures")
    return [dataset.images(np.flatnonzero(shows == number)) for number in range(len(concept.erase))]


def watched_tokens(pipeline: Pipeline, text: str, templates: Sequence[str]) -> np.ndarray:
    """Which tokens of every frame with a text attention is suppressed at, bool [P, L]: the text's and all ends."""
    prompts = [template.format(text) for template in templates]
    return np.stack([attention_maps.positions(pipeline, prompt, text, end=True) for prompt in prompts])


def example_of(
    pipeline: Pipeline,
    text: str,
    templates: Sequence[str],
    watched: np.ndarray,
    pictures: np.ndarray,
    masks: str | Segmenter,
) -> Example:
    """Pictures of a text, images_u8 [N, H, W, 3], with where they show it, under every frame with the text."""
    prompts, images = [template.format(text) for template in templates], len(pictures)
    encoded = latents.encode(pipeline, data.from_arrays(pictures, [text] * images, "MACE"))
    mean, std = encoded.scaled(pipeline)
    context = closed_form.text_states(pipeline, prompts).astype(np.float32)
    if masks == "attention":
        named = attention_maps.positions(pipeline, prompts[0], text, end=False)
        found = masks_from_attention(pipeline, mean, context[:1], named)
    else:
        found = np.ones((images, 1, 1), bool) if isinstance(masks, str) else np.asarray(masks(pictures, text), bool)
    if found.ndim != 3 or len(found) != images or found.shape[1] != found.shape[2]:
        raise ValueError(f"MACE: masks of {text!r} have shape {found.shape}, expected square ones, ({images}, S, S).")
    # An image in which nothing was found is masked everywhere, as in the authors' code.
    return Example(mean, std, found | ~found.any((1, 2), keepdims=True), context, watched)


def masks_from_attention(pipeline: Pipeline, mean: np.ndarray, context: np.ndarray, watched: np.ndarray) -> np.ndarray:
    """Where the base model looks at the watched tokens, bool [L], in images' latents [N, h, w, C]: bool [N, h, h].

    The attention of all layers at a quarter of the schedule, averaged over heads and tokens at the latents' size, above
    the middle of its range in the image.
    """
    noise = np.random.default_rng(0).standard_normal(mean.shape, np.float32)
    denoiser, schedule = backbones.denoiser(pipeline), backbones.schedule(pipeline)
    t = np.full(len(mean), len(schedule) // 4, np.int32)
    noisy = denoiser.mix(schedule, Drawn(jnp.asarray(mean), jnp.asarray(noise), jnp.asarray(t)))
    text = Condition(np.repeat(context, len(mean), 0))
    maps = _maps(denoiser, denoiser.backbone.weights(pipeline), noisy, t, text)
    seen, size = 0.0, mean.shape[1]
    for layer in maps:
        side = round(layer.shape[2] ** 0.5)
        mass = np.asarray(layer)[..., watched].mean((1, 3)).reshape(-1, side, side)
        rows = np.arange(size) * side // size
        seen = seen + mass[:, rows][:, :, rows]
    low, high = np.min(seen, (1, 2), keepdims=True), np.max(seen, (1, 2), keepdims=True)
    return seen > (low + high) / 2


@functools.partial(jax.jit, static_argnums=0)
def _maps(denoiser: Denoiser, weights: Params, noisy: jax.Array, t: jax.Array, text: Condition) -> list[jax.Array]:
    return attention_maps.cross_attention(denoiser, weights, noisy, t, text)


METHOD = Method("mace", "MACE", align, backbones=("sd",), data_options=("pictures",))
