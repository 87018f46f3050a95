"""What a method costs at its authors' settings, counted by running it with nothing expensive in it.

Every function that samples, encodes or trains is replaced by one that only counts: how many images are made, how many
evaluations of the UNet sampling takes (one sample each; guidance takes two), and how many training steps there are. A
step's cost is what XLA counts in its own gradient program, divided by what it counts in one evaluation of the same
UNet, so that passes without gradient, frozen weights and batches are in it as the code has them. So one number, the
cost of an evaluation, turns counts into time on any backbone.

The UNet is the emoji world's on latents of 16x16, where attention takes about the share that it has in Stable Diffusion
on 64x64, with text of 77 tokens. Of every training at most `DRAWN` steps, evenly spaced, are looked at and stand for
their neighbours, since how far a step samples is drawn at random; of ResAlign, whose loop is its own, a tenth. The text
encoder weighs a little more here than in Stable Diffusion. Closed-form edits are left out; `benchmarks.methods
--full_uce` measures one.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import jax
import numpy as np

import convert
from spqr_jax import backbones, generate, mini
from spqr_jax.backbones import Condition
from spqr_jax.concepts import NUDITY
from spqr_jax.methods import METHODS, Concept, defaults, mace, resalign
from spqr_jax.methods.tools import loop
from spqr_jax.pipeline import Pipeline
from spqr_jax.sampling import partial
from spqr_jax.training import latents

DRAWN = 50
SIDE, TOKENS = 16, 77
OWN_LOOP = {"resalign": 10}  # of so many steps one is looked at


@dataclass
class Counts:
    """What a method does; evaluations and steps may be fractions, being means.

    pictures: made and decoded. encoded: images that the VAE encodes. sampling: evaluations of the UNet without
    gradient, in whole and partial samples. steps: gradient steps, attacks and masks included. training: their cost in
    evaluations.
    """

    pictures: float = 0
    encoded: float = 0
    sampling: float = 0
    steps: float = 0
    training: float = 0


@dataclass
class Tally:
    """Counts, and what a count stands for while it is taken."""

    evaluation: float  # FLOP
    counts: Counts = field(default_factory=Counts)
    weight: float = 1.0
    costs: dict[Any, tuple[float, Any]] = field(default_factory=dict)

    def add(self, **amounts: float) -> None:
        for name, amount in amounts.items():
            setattr(self.counts, name, getattr(self.counts, name) + self.weight * amount)

    def step(self, function: Callable[..., Any], *inputs: Any, static: int = 0) -> Any:
        """Count one call of a function whose first `static` arguments are static; zeros in the shape of its result."""
        key = (function, inputs[:static], tuple(np.shape(leaf) for leaf in jax.tree.leaves(inputs[static:])))
        if key not in self.costs:
            program = jax.jit(function, static_argnums=tuple(range(static)))
            result = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), program.eval_shape(*inputs))
            self.costs[key] = program.lower(*inputs).cost_analysis()["flops"] / self.evaluation, result
        cost, result = self.costs[key]
        self.add(steps=1, training=cost)
        return result


def rehearse(name: str, concept: Concept = NUDITY, **options: Any) -> Counts:
    """Counts of one of METHODS at its defaults, but for `options`."""
    pipeline = stand_in()
    tally = Tally(evaluation_flop(pipeline))
    share = 1 if "steps" in options else OWN_LOOP.get(name, 1)
    if share > 1:
        options["steps"] = defaults(METHODS[name])["steps"] // share
    with replaced(tally):
        METHODS[name].align(pipeline, concept, **options)
    tally.counts.steps *= share
    tally.counts.training *= share
    return tally.counts


def stand_in() -> Pipeline:
    """The emoji world's pipeline for latents of SIDE x SIDE and texts of TOKENS tokens."""
    pipeline = convert.load(mini.model_path())
    text = {**pipeline.configs["text_encoder"], "max_position_embeddings": TOKENS}
    definition, shapes = backbones.define("text_encoder", text)
    encoder = jax.tree.map(lambda x: np.full(x.shape, 0.01, x.dtype), shapes)
    configs = {**pipeline.configs, "text_encoder": text, "unet": {**pipeline.configs["unet"], "sample_size": SIDE}}
    definitions = {**pipeline.definitions, "text_encoder": definition}
    return pipeline.with_params(text_encoder=encoder)._replace(configs=configs, definitions=definitions)


def evaluation_flop(pipeline: Pipeline) -> float:
    """FLOP that XLA counts in one evaluation of the UNet for one sample."""
    config, definition = pipeline.configs["unet"], pipeline.definitions["unet"]
    noisy = np.zeros((1, SIDE, SIDE, config["in_channels"]), np.float32)
    context = np.zeros((1, TOKENS, config["cross_attention_dim"]), np.float32)
    program = jax.jit(lambda params, *inputs: definition.bind(params)(*inputs))
    lowered = program.lower(pipeline.params["unet"], noisy, np.zeros(1, np.int32), context)
    return lowered.cost_analysis()["flops"]


@contextlib.contextmanager
def replaced(tally: Tally) -> Iterator[None]:
    """While it lasts, methods count instead of computing."""
    steps = {"_direct": 1, "_harm_gradient": 1, "_hypergradient": 2, "_tuning_step": 1}  # static arguments of each
    with contextlib.ExitStack() as stack:

        def put(module: Any, name: str, function: Callable[..., Any]) -> None:
            stack.enter_context(mock.patch.object(module, name, function))

        put(generate, "generate", _generate(tally))
        put(latents, "encode", _encode(tally))
        put(loop, "fit", _fit(tally))
        put(partial, "walk", _walk(tally))
        put(mace, "masks_from_attention", _masks(tally))
        put(partial, "partial_sample", _partial_sample(tally))
        for name, static in steps.items():
            put(resalign, name, _counted(tally, inspect.unwrap(getattr(resalign, name)), static))
        yield


# --- what stands in --------------------------------------------------------------------------------------------------


def _generate(tally: Tally):
    def count(pipeline: Pipeline, prompts: Any, seeds: Any, *, steps: int, guidance: float, scheduler: str):
        evaluations = (steps + (scheduler == "pndm")) * (2 if guidance > 1 else 1)
        tally.add(pictures=len(prompts), sampling=len(prompts) * evaluations)
        side = backbones.of(pipeline).side(pipeline)
        return np.zeros((len(prompts), side, side, 3), np.uint8)

    return count


def _encode(tally: Tally):
    def count(pipeline: Pipeline, dataset: Any) -> latents.Latents:
        tally.add(encoded=len(dataset))
        zeros = np.zeros((len(dataset), SIDE, SIDE, pipeline.configs["unet"]["in_channels"]), np.float32)
        return latents.Latents(zeros, zeros)

    return count


def _partial_sample(tally: Tally):
    def count(
        denoiser: Any, params: Any, tables: Any, noise: np.ndarray, given: Any, stop: int, guided: bool
    ) -> np.ndarray:
        area = noise.shape[1] * noise.shape[2] / SIDE**2
        tally.add(sampling=(1 + guided) * area * len(noise) * stop)
        return noise

    return count


def _walk(tally: Tally):
    def count(sampler: Any, weights: Any, text: Any, empty: Any, done: int, rng: Any) -> np.ndarray:
        tally.add(sampling=2 * len(text.context) * done)
        return np.zeros((len(text.context), *sampler.shape), np.float32)

    return count


def _masks(tally: Tally):
    def count(pipeline: Pipeline, mean: np.ndarray, context: Any, watched: Any) -> np.ndarray:
        tally.add(sampling=len(mean))
        return np.ones((len(mean), SIDE, SIDE), bool)

    return count


def _fit(tally: Tally):
    def count(name, gradient, static, adam, params, inputs, steps: int, *, frozen=(), mask=None, progress=False):
        chosen = np.unique(np.linspace(0, steps - 1, min(steps, DRAWN)).round().astype(int)) if steps else []
        before = tally.weight
        tally.weight *= steps / max(len(chosen), 1)  # the inputs of a step may train too: an attack in every step
        for i in chosen:
            tally.step(gradient, static, params, *frozen, *inputs(int(i), params, *frozen), static=1)
        tally.weight = before
        return params

    return count


def _counted(tally: Tally, function: Callable[..., Any], static: int):
    return lambda *inputs: tally.step(function, *inputs, static=static)


def trained_step(pipeline: Pipeline | None = None) -> float:
    """The cost in evaluations of one sample's step on every weight of the UNet: what `--step_seconds` measures."""
    pipeline = pipeline or stand_in()
    tally, config = Tally(evaluation_flop(pipeline)), pipeline.configs["unet"]
    mean = np.zeros((1, SIDE, SIDE, config["in_channels"]), np.float32)
    condition = Condition(np.zeros((1, TOKENS, config["cross_attention_dim"]), np.float32))
    denoiser = backbones.denoiser(pipeline)
    static, batch = resalign.Static(denoiser, denoiser), {"mean": mean, "std": mean, "condition": condition}
    inputs = backbones.schedule(pipeline), batch, jax.random.key(0)
    tally.step(resalign._PLAIN, static, pipeline.params["unet"], *inputs, static=1)
    return tally.counts.training
