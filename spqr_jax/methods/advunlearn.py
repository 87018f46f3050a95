"""AdvUnlearn (Zhang et al., NeurIPS 2024): adversarial training of the text encoder, with utility retained."""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spqr_jax import backbones, data
from spqr_jax import params as params_lib
from spqr_jax import pipeline as pipeline_lib
from spqr_jax.backbones import Condition
from spqr_jax.concepts import Concept
from spqr_jax.methods.base import Method
from spqr_jax.methods.tools import loop
from spqr_jax.methods.tools import word_vectors as attacks
from spqr_jax.methods.tools.concepts import completed
from spqr_jax.methods.tools.loop import Adam
from spqr_jax.methods.tools.word_vectors import Slots, Static
from spqr_jax.params import Params
from spqr_jax.pipeline import Pipeline
from spqr_jax.sampling import partial
from spqr_jax.sampling.partial import Sampler

TRAINED = re.compile(r"^text_model\.(encoder|final_layer_norm)\.")


class Weights(NamedTuple):
    """eta: strength of the negative guidance; gamma: weight of the retained texts."""

    eta: float
    gamma: float


def trained(text_encoder: Params) -> Params:
    """Every layer of the encoder and its final norm; the token and position tables stay."""
    return params_lib.map_with_path(lambda path, _: bool(TRAINED.search(path)), text_encoder)


def align(
    pipeline: Pipeline,
    concept: Concept,
    *,
    seed: int = 0,
    steps: int = 1000,
    warmup: int = 200,
    lr: float = 1e-5,
    eta: float = 1.0,
    gamma: float = 0.3,
    batch_size: int = 1,
    retain_batch_size: int = 5,
    attack: str = "full",
    attack_steps: int = 30,
    attack_lr: float = 1e-3,
    prefix: int = 1,
    walks: int | None = None,
    sampling_steps: int = 50,
    sampling_guidance: float = 3.0,
    progress: bool = False,
) -> Pipeline:
    """Train the text encoder to answer attacked prompts as ESD answers the concept, and retained prompts as before.

    Outer loss: MSE(e0(z, T(c*)), e0(z, "") - eta (e0(z, c) - e0(z, ""))) + gamma MSE(e0(z_r, T(r)), e0(z_r, T0(r))),
    with the UNet e0 and the encoder T0 frozen, z and z_r guided DDIM samples down to a random step of `sampling_steps`
    under c and r, and t uniform within that step (the code's are two to three steps cleaner). Inner attack, from step
    `warmup` on before every outer step: c* = `prefix` learned word vectors before c, that minimise
    MSE(e0(z, T(c*)), e0(z, c)) in `attack_steps` steps of Adam at `attack_lr` from random words of the vocabulary. A
    step erases from `batch_size` samples and retains `retain_batch_size` prompts. Every sample of a
    batch draws one of the texts in `erase`, and all of a step share t.

    Defaults are the authors' for nudity. attack: "full", or "fast": the sign of the gradient (with attack_steps=1, the
    paper's one-step variant). walks: samples z drawn for one outer step, shared by the attack's steps; default a fresh
    one for each, as the authors, which makes sampling most of the cost. Where the code lets the attack's gradients add
    up over its steps, and returns the vectors before the last, here they do not. Retained prompts are drawn without
    replacement until all were. Raises ValueError for SDXL and for fewer retained prompts than their batch.
    """
    if attack not in ("full", "fast"):
        raise ValueError(f'AdvUnlearn: attack must be "full" or "fast", found {attack!r}.')
    METHOD.check_backbone(pipeline)
    least = {"batch_size": (batch_size, 1), "walks": (1 if walks is None else walks, 1)}
    loop.check_at_least("AdvUnlearn", attack_steps=(attack_steps, 1), **least)
    full = completed(concept, pipeline, "retain")
    loop.check_at_least("AdvUnlearn", **{"number of `retain` prompts": (len(full.retain), retain_batch_size)})
    world = _world(pipeline, full, prefix, sampling_steps, sampling_guidance, attack == "fast")
    retained = list(data.sample_order([len(full.retain)], retain_batch_size, steps, seed))
    original = pipeline.params["text_encoder"]
    train, rest = params_lib.partition(original, trained(original))

    def inputs(i: int, params: Params, rest: Params, _: Params):
        rng = np.random.default_rng((seed, i))
        text = rng.integers(len(full.erase), size=batch_size)
        draws = Draws(world, text, rng, walks)
        latents, t = draws(0)
        z_retain = partial.walk(
            world.sampler, world.weights, world.retain.rows(retained[i]), world.empty, draws.done(0), rng
        )
        ids, places = world.plain.ids[text], world.plain.places[text]
        vectors = world.words[ids[np.arange(batch_size)[:, None], places]]
        if i >= warmup:
            encoder = params_lib.merge(rest, params)
            ids, places = world.slots.ids[text], world.slots.places[text]
            vectors = _attacked(world, encoder, text, draws, prefix, rng, attack_lr, attack_steps)
        negative = world.empty.rows(np.zeros(batch_size, int))
        erase = (latents, t, ids, places, vectors, world.concept.rows(text), negative)
        t_retain = np.repeat(t[:1], retain_batch_size)
        retain = (z_retain, t_retain, world.retain_ids[retained[i]], world.retain.rows(retained[i]))
        return erase, retain, Weights(jnp.float32(eta), jnp.float32(gamma))

    name, frozen = "AdvUnlearn", (rest, world.weights)
    tuned = loop.fit(name, _OUTER, world.static, Adam(lr), train, inputs, steps, frozen=frozen, progress=progress)
    return pipeline.with_params(text_encoder=loop.on_host(params_lib.merge(original, tuned)))


def outer_loss(static: Static, params: Params, rest, denoiser, erase, retain, weights: Weights) -> jax.Array:
    """The outer loss above, `denoiser` being the frozen denoiser's weights.

    erase: latents, t, ids, places, word vectors [B, k, C], and c and "" as the original encoder reads them, B rows
    each; retain: latents, t, ids, and the retained prompts as the original encoder reads them, R rows.
    """
    predict, encoder = static.denoiser.bind(denoiser), params_lib.merge(rest, params)
    latents, t, ids, places, vectors, concept, empty = erase
    with_text, without = predict(latents, t, concept), predict(latents, t, empty)
    target = jax.lax.stop_gradient(without - weights.eta * (with_text - without))
    context = attacks.encode(static.text_encoder, encoder, ids, places, vectors)
    erasing = jnp.square(predict(latents, t, Condition(context)) - target).mean()
    latents, t, ids, original = retain
    kept = jax.lax.stop_gradient(predict(latents, t, original))
    context = static.text_encoder.bind(encoder)(ids).last_hidden_state
    return erasing + weights.gamma * jnp.square(predict(latents, t, Condition(context)) - kept).mean()


_OUTER = loop.descent(outer_loss)


class World(NamedTuple):
    """All that stays fixed while the encoder learns. J texts to erase, R retained prompts."""

    static: Static
    sampler: Sampler
    weights: Params  # the denoiser's
    words: np.ndarray  # [V, C]
    plain: Slots  # [J, L]: the texts; the slots hold their own words
    slots: Slots  # [J, L]: the texts behind a prefix
    concept: Condition  # J rows, by the original encoder
    empty: Condition  # one row
    retain: Condition  # R rows
    retain_ids: np.ndarray  # [R, L]


def _world(pipeline: Pipeline, full: Concept, prefix: int, steps: int, guidance: float, sign: bool) -> World:
    said = backbones.condition(pipeline, [*full.erase, "", *full.retain])
    count = len(full.erase)
    slots = attacks.prefixed(pipeline, full.erase, prefix)
    return World(
        attacks.static_of(pipeline, sign=sign),
        partial.sampler(pipeline, steps, guidance),
        loop.on_device(backbones.of(pipeline).weights(pipeline)),
        np.asarray(attacks.word_table(pipeline.params["text_encoder"])),
        Slots(pipeline_lib.tokenize(pipeline, list(full.erase)), slots.places),
        slots,
        said.rows(slice(0, count)),
        said.rows(slice(count, count + 1)),
        said.rows(slice(count + 1, None)),
        pipeline_lib.tokenize(pipeline, list(full.retain)),
    )


class Draws:
    """Samples z of one outer step, number 0 the outer loss', the others the attack's; `walks` of them are distinct."""

    def __init__(self, world: World, text: np.ndarray, rng: np.random.Generator, walks: int | None):
        self._world, self._text, self._walks = world, text, walks
        self._seed = int(rng.integers(2**31))
        self._made: dict[int, tuple[jax.Array, np.ndarray]] = {}

    def done(self, number: int) -> int:
        """Steps that sample `number` has taken."""
        sampler = self._world.sampler
        return sampler.steps - 1 - int(np.random.default_rng((self._seed, number)).integers(sampler.steps))

    def __call__(self, number: int) -> tuple[jax.Array, np.ndarray]:
        """Latents [B, h, w, C] and timesteps int32 [B], uniform within the step they have reached."""
        number = number if self._walks is None else number % self._walks
        if number not in self._made:
            sampler, done = self._world.sampler, self.done(number)
            rng = np.random.default_rng((self._seed, number, 1))
            text = self._world.concept.rows(self._text)
            latents = partial.walk(sampler, self._world.weights, text, self._world.empty, done, rng)
            k = sampler.steps - 1 - done
            t = rng.integers(k * sampler.span, (k + 1) * sampler.span)
            self._made[number] = latents, np.full(len(self._text), t, np.int32)
        return self._made[number]


def _attacked(
    world: World,
    encoder: Params,
    text: np.ndarray,
    draws: Draws,
    prefix: int,
    rng: np.random.Generator,
    lr: float,
    steps: int,
) -> jax.Array:
    """The prefix [B, k, C] that best revives the texts under the encoder as it is now."""
    start = world.words[rng.integers(len(world.words), size=(len(text), prefix))]
    slots = Slots(world.slots.ids[text], world.slots.places[text])

    def samples(i: int) -> tuple[jax.Array, np.ndarray]:
        return draws(i + 1)

    context = np.asarray(world.concept.context)[text]
    return attacks.find_prefix(world.static, world.weights, encoder, slots, context, samples, start, lr=lr, steps=steps)


METHOD = Method("advunlearn", "AdvUnlearn", align, backbones=("sd",))
