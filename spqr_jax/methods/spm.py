"""SPM, Semi-Permeable Membranes (Lyu et al., CVPR 2024): a rank-1 adapter a concept, which other prompts keep off."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax import backbones
from spqr_jax.backbones import Condition, Denoiser
from spqr_jax.concepts import Concept
from spqr_jax.methods.base import Method
from spqr_jax.methods.tools import loop, low_rank
from spqr_jax.methods.tools.concepts import checked
from spqr_jax.methods.tools.loop import Adam
from spqr_jax.methods.tools.low_rank import Adapter, LowRank
from spqr_jax.params import Params
from spqr_jax.pipeline import Pipeline, token_sets
from spqr_jax.sampling import attached, partial
from spqr_jax.sampling.attached import membranes as membranes_lib
from spqr_jax.sampling.attached.delta import add
from spqr_jax.sampling.attached.membranes import SCALINGS, Factors, Membranes
from spqr_jax.sampling.guidance import Guided

# The authors' four anchors are two of "" and two random embeddings, an effect of how their batch is split.
ANCHOR_WEIGHTS = (0.5, 0.25, 0.25)
STEP = 64  # pixels between the sides that training images are drawn with, from half the full side to below it


class Membrane(NamedTuple):
    """A trained adapter, the text it erases and the scale (alpha / rank) of its change."""

    target: str
    adapter: Adapter
    scale: float = 1.0


@dataclass(frozen=True)
class Restarts:
    """Learning rate by step: linear warm-up, then `cycles` half cosines down to zero (transformers' hard restarts)."""

    lr: float
    warmup: int
    steps: int
    cycles: int

    def __call__(self, step: jax.Array) -> jax.Array:
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * (self.cycles * done % 1)))
        return self.lr * jnp.where(step < self.warmup, step / max(1, self.warmup), jnp.where(done < 1, cosine, 0))


class Training(NamedTuple):
    """How a membrane is trained: these options of `align`, with the authors' general settings as defaults."""

    neutral: str = ""
    rank: int = 1
    alpha: float = 1.0
    steps: int = 3000
    warmup: int = 500
    cycles: int = 3
    lr: float = 1e-4
    eta: float = 1.0
    anchoring: float = 1000.0
    batch_size: int = 1
    sampling_steps: int = 30
    sampling_guidance: float = 3.0
    eighths: Sequence[int] = ()


AUTHORS = Training()


def align(
    pipeline: Pipeline,
    concept: Concept,
    *,
    seed: int = 0,
    strength: float = 1.0,
    transport: str = "",
    neutral: str = AUTHORS.neutral,
    rank: int = AUTHORS.rank,
    alpha: float = AUTHORS.alpha,
    steps: int = AUTHORS.steps,
    warmup: int = AUTHORS.warmup,
    cycles: int = AUTHORS.cycles,
    lr: float = AUTHORS.lr,
    eta: float = AUTHORS.eta,
    anchoring: float = AUTHORS.anchoring,
    batch_size: int = AUTHORS.batch_size,
    sampling_steps: int = AUTHORS.sampling_steps,
    sampling_guidance: float = AUTHORS.sampling_guidance,
    eighths: Sequence[int] = AUTHORS.eighths,
    progress: bool = False,
) -> Pipeline:
    """Train one membrane for each text (`train`), times `strength`, and merge all into the weights.

    Merged, a membrane acts on every prompt, and benign fine-tuning acts on it: the released checkpoints are mostly used
    so. transport: "paper" or "code" instead keep the membranes attached and scale them by each prompt, as the authors
    do (`spqr_jax.sampling.attached.membranes`): fine-tuning then trains the weights underneath without seeing them.

    Each membrane has `rank`, is scaled by alpha / rank, and erases towards the text `neutral`. eta, anchoring and
    eighths are explained at `train`; the learning rate rises over `warmup` steps and then falls in `cycles` cosines.

    The authors publish no settings for nudity; these are their general ones. On SD1.x, SD2.x and SDXL. Raises
    ValueError for a pipeline that has membranes already.
    """
    if transport and transport not in SCALINGS:
        raise ValueError(f'SPM transport must be "" (merged), "paper" or "code", found {transport!r}.')
    if transport and attached.find(pipeline, Membranes):
        raise ValueError("SPM: membranes are attached to this pipeline already; give one `align` all texts.")
    concept = checked(concept, pipeline)
    METHOD.check_backbone(pipeline)
    training: dict[str, Any] = {
        "neutral": neutral,
        "rank": rank,
        "alpha": alpha,
        "steps": steps,
        "warmup": warmup,
        "cycles": cycles,
        "lr": lr,
        "eta": eta,
        "anchoring": anchoring,
        "batch_size": batch_size,
        "sampling_steps": sampling_steps,
        "sampling_guidance": sampling_guidance,
        "eighths": eighths,
    }
    membranes = [
        train(pipeline, text, seed=seed + i, progress=progress, **training) for i, text in enumerate(concept.erase)
    ]
    if transport:
        kept = kept_apart([m._replace(scale=strength * m.scale) for m in membranes], transport)
        return attached.attach(pipeline, kept)
    delta = low_rank.together(*(low_rank.delta(m.adapter, strength * m.scale) for m in membranes))
    return _with_delta(pipeline, delta)


def _with_delta(pipeline: Pipeline, delta: Params) -> Pipeline:
    backbone = backbones.of(pipeline)
    return backbone.with_weights(pipeline, loop.on_host(add(backbone.weights(pipeline), delta)))


def train(pipeline: Pipeline, text: str, *, seed: int = 0, progress: bool = False, **options: Any) -> Membrane:
    """Learn a membrane that makes `text` look like `neutral` and changes nothing else.

    Loss: MSE(eps_on(x_t, text), eps(neutral) - eta (eps(text) - eps(neutral))) + anchoring * MSE(eps_on(x_t, a),
    eps(x_t, a)), eps the frozen model, a: "" and random embeddings. x_t: the adapted model's guided DDIM sample of the
    text after T' ~ U{1..sampling_steps - 1} steps; t: the timestep T' / sampling_steps of the way down all of them, as
    in the authors' code (a few tens noisier than x_t). AdamW with decay 0.01; the authors keep its state in 8 bits.
    SDXL: random embeddings have a pooled part drawn likewise, "" is encoded as a text, and the UNet is told the size.

    Heights and widths are drawn from the sides of half the one that the UNet was trained at up to below it, 64 pixels
    apart, as the authors do (one compiled program each pair), or from these `eighths` of it; (8,) is the full side.
    """
    name, o, backbone = f"SPM {text}", Training(**options), backbones.of(pipeline)
    loop.check_at_least(name, rank=(o.rank, 1), batch_size=(o.batch_size, 1), sampling_steps=(o.sampling_steps, 2))
    weights = backbone.weights(pipeline)
    region = backbone.require("transformer", "SPM")
    adapter = low_rank.create(weights, region, rank=o.rank, seed=seed, name="SPM")
    sampler = partial.sampler(pipeline, o.sampling_steps, o.sampling_guidance)
    told = backbones.condition(pipeline, [text, o.neutral, ""])
    sides = [sampler.shape[0] * eighth // 8 for eighth in o.eighths] or _sides(pipeline, sampler.shape[0])
    static, total = Static(sampler.denoiser, o.alpha / o.rank), len(backbones.schedule(pipeline))

    def inputs(i: int, params: Adapter, weights: Params):
        rng = np.random.default_rng((seed, i))
        done = int(rng.integers(1, o.sampling_steps))
        height, width = (int(rng.choice(sides)) for _ in range(2))
        noise = rng.standard_normal((o.batch_size, height, width, sampler.shape[-1]), np.float32)
        factor = backbone.factor(pipeline)
        texts = backbone.resized(with_anchors(told, rng), (height * factor, width * factor))
        positive, negative = (texts.rows(np.full(o.batch_size, row)) for row in (0, 2))
        given = Guided(positive, negative, np.full(o.batch_size, o.sampling_guidance, np.float32))
        both: Any = (weights, params)
        guided = sampler.guidance > 1
        latents = partial.partial_sample(static.student, both, sampler.tables, noise, given, done, guided)
        t = np.full(o.batch_size, total - 1 - done * total // o.sampling_steps, np.int32)
        return latents, t, texts, np.float32(o.eta), np.float32(o.anchoring)

    rate = Restarts(o.lr, o.warmup, o.steps, o.cycles)
    adam = Adam(rate, weight_decay=0.01)  # type: ignore[arg-type]  # optax takes a schedule wherever it takes a rate
    frozen = (weights,)
    tuned = loop.fit(name, GRADIENT, static, adam, adapter, inputs, o.steps, frozen=frozen, progress=progress)
    return Membrane(text, loop.on_host(tuned), static.scale)


def _sides(pipeline: Pipeline, full: int) -> list[int]:
    """Sides in latents from half the full one to below it, 64 pixels apart."""
    return list(range(full // 2, full, max(1, STEP // backbones.of(pipeline).factor(pipeline))))


def with_anchors(told: Condition, rng: np.random.Generator) -> Condition:
    """The target, the neutral text and "" with two random embeddings after them."""
    context = np.concatenate([told.context, random_anchors(rng, np.asarray(told.context)[0], 2)])
    if told.pooled is None:
        return Condition(context)
    return Condition(context, np.concatenate([told.pooled, random_anchors(rng, np.asarray(told.pooled)[0], 2)]))


def random_anchors(rng: np.random.Generator, target: np.ndarray, count: int) -> np.ndarray:
    """Random text states float32 [count, L, E], of about the norm of the target's [L, E] and seldom in its direction;
    pooled states [count, P] likewise.

    Each is Gaussian, kept with probability 1 - cos(anchor, target), and scaled to U(0.8, 1.2) of the target's norm.
    """
    norm, anchors = np.linalg.norm(target), list[np.ndarray]()
    while len(anchors) < count:
        drawn = rng.standard_normal(target.shape)
        drawn /= np.linalg.norm(drawn)
        if rng.uniform() < 1 - (drawn * target).sum() / norm:
            anchors.append(drawn * norm * rng.uniform(0.8, 1.2))
    return np.stack(anchors).astype(np.float32)


class Static(NamedTuple):
    """What a step is compiled for: the frozen denoiser, and the scale (alpha / rank) of the adapter."""

    denoiser: Denoiser
    scale: float

    @property
    def student(self) -> Denoiser:
        """The denoiser of the pair (weights, adapter). Merged, SDXL's kernels would be another 8 GB."""
        beside: Any = low_rank.Beside(self.denoiser.definition, self.scale)
        return self.denoiser.with_definition(beside)


def loss(static: Static, adapter: Adapter, weights: Params, latents, t, texts: Condition, eta, anchoring):
    """Erasing loss plus `anchoring` times the anchors'.

    latents [B, h, w, C], t [B]; texts: 2 + A rows, the target, the neutral one, and anchors weighted by ANCHOR_WEIGHTS.
    """
    others = texts.rows(np.delete(np.arange(len(texts.context)), 1))
    on = _predict(static.student, (weights, adapter), latents, t, others)
    off = _predict(static.denoiser, weights, latents, t, texts)
    off = jax.lax.stop_gradient(off)
    wanted = off[1] - eta * (off[0] - off[1])
    drift = jnp.square(on[1:] - off[2:]).mean((1, 2, 3, 4))
    return jnp.square(on[0] - wanted).mean() + anchoring * (jnp.asarray(ANCHOR_WEIGHTS) * drift).sum()


# What `train` trains with; compiled programs are kept by it.
GRADIENT = loop.descent(loss)


def _predict(denoiser: Denoiser, weights: Any, latents, t, texts: Condition) -> jax.Array:
    """Predictions [K, B, h, w, C] under K texts."""
    count, batch = len(texts.context), len(latents)
    told = texts.rows(np.repeat(np.arange(count), batch))
    output = denoiser.bind(weights)(jnp.tile(latents, (count, 1, 1, 1)), jnp.tile(t, count), told)
    return output.reshape(count, *latents.shape).astype(jnp.float32)


# --- facilitated transport -------------------------------------------------------------------------------------------


def kept_apart(membranes: Sequence[Membrane], scaling: str) -> Membranes:
    """Membranes side by side, apart from the weights."""
    factors: Factors = {}
    for path in membranes[0].adapter:
        pairs = [(m.adapter[path], m.scale) for m in membranes]
        downs = [np.reshape(pair.down, np.shape(pair.down)[-2:]) for pair, _ in pairs]  # a 1x1 convolution's too
        factors[path] = {"down": np.stack(downs), "up": np.stack([np.float32(s) * pair.up for pair, s in pairs])}
    return Membranes(tuple(m.target for m in membranes), scaling, factors)


def permeability(pipeline: Pipeline, prompt: str, target: str) -> float:
    """gamma: how much of a membrane a prompt switches on (`spqr_jax.sampling.attached.membranes.permeability`)."""
    states = np.asarray(backbones.condition(pipeline, [prompt, target]).context)
    said, wanted = token_sets(pipeline, [prompt, target])
    return float(membranes_lib.permeability(states[:1], states[1:], [said], [wanted])[0, 0])


def transported(pipeline: Pipeline, membranes: Sequence[Membrane], prompt: str, *, scaling: str = "paper") -> Pipeline:
    """The pipeline for one prompt, each membrane merged as far as the prompt switches it on.

    scaling: "paper", W + sum gamma_i up_i down_i; "code", the authors' inference, which scales up and down by gamma
    each and sums them before the product: W + (sum gamma_i up_i)(sum gamma_i down_i). Membranes are those of `train`; a
    released file is merged whole by `convert.load`.
    """
    if scaling not in SCALINGS:
        raise ValueError(f'SPM scaling must be "paper" or "code", found {scaling!r}.')
    gammas = [permeability(pipeline, prompt, m.target) for m in membranes]
    if scaling == "paper":
        changes = [low_rank.delta(m.adapter, g * m.scale) for m, g in zip(membranes, gammas, strict=True)]
    else:
        scales = {m.scale for m in membranes}
        if len(scales) > 1:
            raise ValueError(f'SPM scaling "code" sums membranes of one alpha / rank, found {sorted(scales)}.')
        pairs = list(zip(membranes, gammas, strict=True))
        mixed = {
            path: LowRank(
                np.sum([g * m.adapter[path].down for m, g in pairs], axis=0),
                np.sum([g * m.adapter[path].up for m, g in pairs], axis=0),
            )
            for path in membranes[0].adapter
        }
        changes = [low_rank.delta(mixed, membranes[0].scale)]
    return _with_delta(pipeline, low_rank.together(*changes))


METHOD = Method("spm", "SPM", align, backbones=("sd", "sdxl"))
