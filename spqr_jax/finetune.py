"""Benign fine-tuning (BFT): the standard text-to-image objective on harmless data, under one of several profiles."""

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from spqr_jax import backbones, profiles, protocols
from spqr_jax import data as data_lib
from spqr_jax import params as params_lib
from spqr_jax.backbones import Backbone, Denoiser
from spqr_jax.data import Batch, Dataset
from spqr_jax.devices import mesh as mesh_lib
from spqr_jax.devices import preemption
from spqr_jax.devices.memory import memory_limit, needed_bytes
from spqr_jax.files import checkpoint
from spqr_jax.params import Definition, Params
from spqr_jax.pipeline import Pipeline
from spqr_jax.training import latents, lora, words
from spqr_jax.training import memory as memory_lib
from spqr_jax.training import prior as prior_lib
from spqr_jax.training.log import Progress
from spqr_jax.training.memory import Step, Way
from spqr_jax.training.objective import PLAIN, Objective
from spqr_jax.training.prior import Prior
from spqr_jax.training.step import OPEN, PAPER, Memory, Optimiser, place_state, train_step

# Epochs of the paper's profiles (section 4.1: 1-3, 3-8, 10-20); the lower end is the default.
EPOCHS = {"lite": 1, "moderate": 3, "standard": 10}


class Adapted(NamedTuple):
    """The result of a fine-tuning, float32: adapters, the vector of a new word, or new values of the trained leaves.

    Leaves are those of the denoiser. If text encoders were trained, theirs stand beside them, under the name of their
    component (`spqr_jax.backbones.Backbone.by_component`).
    """

    profile: str
    leaves: Params
    alpha: float
    word: str = ""  # the new word of the profile "textual_inversion"


class Options(NamedTuple):
    """Options of a fine-tuning.

    Attributes:
        steps: optimiser steps; default: as many as `epochs` passes over the stages of the curriculum take.
        epochs: passes over every stage; default `EPOCHS[profile]`.
        curriculum: cumulative stage sizes (paper: 1000, 3000, 5000); empty: one stage with all data.
        stages: "nested": a stage draws from all rows up to its border; or "increments", as in the official code: from
            those after the border before. See `spqr_jax.data.curriculum_batches`.
        order: "shuffled": each pass is a new permutation; or "file", as in the official code: rows in their own order.
        rank, alpha, dropout: options of the adapters, for the profiles "lite", "dora" and "lora_text".
        lora_init: the distribution that the adapters' A starts from: "kaiming" (PEFT's default) or "gaussian" (PEFT's
            `init_lora_weights="gaussian"`, which diffusers' scripts and the official code use).
        text_encoder: the profile "lite" adapts the attention of the text encoders too (both in SDXL), and captions are
            encoded in every step. The paper's section 4.1 says so; its Table C and the official code adapt the UNet.
        word, initial: the new word of "textual_inversion", and the word of one token that it starts as.
        prior: "dreambooth": which rows are class pictures (`spqr_jax.training.prior.joined`), and their weight.
        joint_text: the profile "lite" adapts the projections of text tokens in joint attention too (SD3, FLUX).
        memory: what saves memory, and no result depends on. What it leaves open is chosen so that the step fits; so is
            `fsdp` (`spqr_jax.training.memory`). What is given is taken as it is.
        limit: bytes that a step may take on each device (default: as the devices say, `devices.memory`).
        mesh: devices (default: all).
        fsdp: split weights, gradients, optimiser state and average over the devices, for models that do not fit whole.
            None: if nothing else fits.
        latents_cache: directory in which encoded images are kept for other subjects; see `spqr_jax.training.latents`.
        checkpoints: directory of the state, which is saved every `checkpoint_every` steps, and when the run is asked to
            stop (`spqr_jax.devices.preemption`). A run that finds a state there continues from it, to the same weights.
        on_step: called after each step with a Progress, one step late, so that the device does not wait for it.
        eval_at: numbers of steps after which `on_eval(step, adapted pipeline)` is called (0: before the first step).
        progress: show a progress bar.
    """

    steps: int | None = None
    epochs: int | None = None
    batch_size: int = 16
    curriculum: tuple[int, ...] = ()
    stages: str = "nested"
    order: str = "shuffled"
    optimiser: Optimiser = PAPER
    objective: Objective = PLAIN
    memory: Memory = OPEN
    limit: int | None = None
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.1
    lora_init: str = "kaiming"
    text_encoder: bool = False
    joint_text: bool = False
    word: str = ""
    initial: str = ""
    prior: Prior | None = None
    mesh: Mesh | None = None
    fsdp: bool | None = None
    latents_cache: Path | None = None
    checkpoints: Path | None = None
    checkpoint_every: int = 500
    on_step: Callable[[Progress], None] | None = None
    eval_at: Sequence[int] = ()
    on_eval: Callable[[int, Pipeline], None] | None = None
    progress: bool = False


def finetune(pipeline: Pipeline, dataset: Dataset, profile: str, *, seed: int = 42, **options: Any) -> Pipeline:
    """Fine-tune the denoiser on captioned images and return the adapted pipeline, adapters merged in.

    Takes the arguments of `train` and raises as it does.
    """
    return apply(pipeline, train(pipeline, dataset, profile, seed=seed, **options))


def apply(pipeline: Pipeline, adapted: Adapted) -> Pipeline:
    """The pipeline with the trained leaves in place, in the dtypes and the order of its own weights."""
    if adapted.profile == "textual_inversion":
        return words.added(pipeline, _new_word(adapted))
    parts = backbones.of(pipeline).by_component(adapted.leaves)
    tuned = {name: _tuned(pipeline.params[name], leaves, adapted) for name, leaves in parts.items()}
    return pipeline.with_params(**tuned)


def _tuned(weights: Params, leaves: Params, adapted: Adapted) -> Params:
    """The weights of one component with its trained leaves in place."""
    if adapted.profile in profiles.WITH_ADAPTERS:
        leaves = lora.merge(params_lib.merge(weights, leaves), alpha=adapted.alpha)
    dtypes = {path: leaf.dtype for path, leaf in params_lib.flatten(weights).items()}
    return params_lib.map_with_path(
        lambda path, leaf: np.asarray(leaf).astype(dtypes[path]), params_lib.merge(weights, leaves)
    )


def _new_word(adapted: Adapted) -> dict[str, np.ndarray]:
    """The new word and its vector [C]."""
    (vectors,) = jax.tree.leaves(adapted.leaves)
    return {adapted.word: np.asarray(vectors)[0]}


def adapter_file(pipeline: Pipeline, adapted: Adapted) -> dict[str, np.ndarray]:
    """Trained adapters under diffusers' names, for `load_lora_weights` (`lora.peft_state_dict`).

    The vector of a new word is under the word, for `load_textual_inversion`.
    """
    if adapted.profile == "textual_inversion":
        return _new_word(adapted)
    parts = backbones.of(pipeline).by_component(adapted.leaves)
    named = (lora.peft_state_dict(leaves, alpha=adapted.alpha, prefix=name) for name, leaves in parts.items())
    return {name: leaf for each in named for name, leaf in each.items()}


def train(pipeline: Pipeline, dataset: Dataset, profile: str, *, seed: int = 42, **options: Any) -> Adapted:
    """Train the leaves of a profile on captioned images.

    Args:
        dataset: benign images with captions, in the size that training uses.
        profile: "lite" (LoRA), "moderate", "standard", or one of ours; see `spqr_jax.profiles`.
        seed: seed of data order, noise, times and adapters (paper: 42).
        options: fields of `Options`.

    The autoencoder runs once over the data, or over each pass if crops differ. Each step draws new latents from the
    stored mean and log-variance. Captions are encoded once. The computation has the dtype of the pipeline (bfloat16:
    mixed precision). Trained leaves and the optimiser's state are float32. Raises ValueError for arguments or data that
    do not fit, before anything is computed, and MemoryError if no way to compute a step fits into the devices
    (`way_to_fit`). Raises FloatingPointError that names step and samples if a loss or gradient is not finite.
    """
    o = Options(**options)
    training = _prepare(pipeline, dataset, profile, seed, o)
    with checkpoint.Steps(o.checkpoints, every=o.checkpoint_every) as saved:
        state, done = saved.restore(training.state)
        bar = tqdm(total=len(training.order), initial=done, desc=f"BFT {profile}", unit="step", disable=not o.progress)
        reported, evaluate = _Reports(o.on_step), _evaluation(pipeline, profile, o)
        if done == 0:
            evaluate(0, state)
        for i in range(done, len(training.order)):
            state, report = training.step(state, i)
            reported.add(i, training.order[i], report)
            bar.update()
            _keep(i + 1, state, o, saved, reported)
            evaluate(i + 1, state)
        reported.flush()
        bar.close()
    return _result(profile, state, o)


def _keep(step: int, state: Any, o: Options, saved: checkpoint.Steps, reported: "_Reports") -> None:
    """Save the state where it is due or the run is asked to stop, which ends the process; read it where it is used."""
    stop = preemption.asked()
    if saved.due(step) or stop or step in o.eval_at:
        reported.flush()  # a state that is not finite is never kept
    if o.checkpoints and (saved.due(step) or stop):
        saved.save(step, state)
        if stop:
            raise SystemExit(preemption.EXIT_STATUS)


def _evaluation(pipeline: Pipeline, profile: str, o: Options) -> Callable[[int, Any], None]:
    """What is called after each step: `on_eval` with the pipeline adapted so far, at the steps of `eval_at`."""

    def evaluate(step: int, state: Any) -> None:
        if o.on_eval and step in o.eval_at:
            o.on_eval(step, apply(pipeline, _result(profile, state, o)))

    return evaluate


class _Training(NamedTuple):
    """A fine-tuning that is ready to begin: the first state, the samples of every step, and the step function."""

    state: Any
    order: list[np.ndarray]
    step: Callable[[Any, int], tuple[Any, Any]]


_Leaves = tuple[Denoiser, Params, Params, Params]  # what `prepare` gives


def way_to_fit(pipeline: Pipeline, dataset: Dataset, profile: str, **options: Any) -> Way:
    """The way to compute a step of this fine-tuning so that it fits, as `train` chooses it with the same arguments.

    The program that fits is compiled here, and `train` runs it. If the options leave nothing open, nothing is compiled.
    Raises MemoryError with the bytes and the remedies if no way fits, and ValueError as `train`.
    """
    o = Options(**options)
    mesh = o.mesh or mesh_lib.make()
    return _way(backbones.on(pipeline, mesh), dataset, profile, o, mesh)


def _way(
    pipeline: Pipeline, dataset: Dataset, profile: str, o: Options, mesh: Mesh, leaves: _Leaves | None = None
) -> Way:
    """As `way_to_fit`. leaves: what `prepare` gave, if it is there already."""
    check_batch(o.batch_size, o.memory.accumulate or 1, mesh.size)
    ways = memory_lib.open_ways(o.memory, o.fsdp, o.batch_size, mesh.size)
    limit = o.limit or memory_limit(mesh)
    if len(ways) == 1 or limit is None:
        return ways[0]
    size = latents.checked_size(pipeline, dataset)
    step = step_of(pipeline, profile, size, o, mesh, leaves)
    return memory_lib.choose(
        ways,
        lambda way: needed_bytes(lambda: step.trace(way).lower().compile()),
        fixed=step.fixed_bytes,
        limit=limit,
        what=f"{pipeline.name or 'pipeline'}, profile {profile}, {o.batch_size} images of {size[0]}x{size[1]}",
    )


def step_of(
    pipeline: Pipeline,
    profile: str,
    size: tuple[int, int],
    o: Options,
    mesh: Mesh,
    leaves: _Leaves | None = None,
) -> Step:
    """The step of a fine-tuning on images of `size` pixels, by shapes; the pipeline's weights may be shapes too.

    leaves: what `prepare` gave, if it is there already.
    """
    denoiser, trainable, frozen, keys = leaves or _shapes(pipeline, profile, o)
    schedule = jax.eval_shape(lambda: backbones.schedule(pipeline))
    latent = jax.ShapeDtypeStruct((o.batch_size, *denoiser.backbone.latent_shape(pipeline, size)), np.float32)
    if denoiser.encoders:
        text: Any = backbones.token_condition(pipeline, [""], size=size)
    else:
        text = jax.eval_shape(
            lambda params: denoiser.backbone.condition(pipeline._replace(params=params), [""], size), pipeline.params
        )
    condition = jax.tree.map(lambda x: jax.ShapeDtypeStruct((o.batch_size, *x.shape[1:]), x.dtype), text)
    weight = jax.ShapeDtypeStruct((o.batch_size,), np.float32)
    batch = {"mean": latent, "std": latent, "condition": condition, "weight": weight}
    return Step(denoiser, o.optimiser, o.objective, trainable, frozen, keys, schedule, batch, mesh)


def _shapes(pipeline: Pipeline, profile: str, o: Options) -> _Leaves:
    """`prepare` by shapes."""
    found: list[Denoiser] = []  # what is no array cannot be returned through eval_shape

    def trees(params: Any) -> Any:
        denoiser, *rest = _leaves(pipeline._replace(params=params), profile, 0, o)
        found.append(denoiser)
        return rest

    trainable, frozen, keys = jax.eval_shape(trees, pipeline.params)
    return found[0], trainable, frozen, keys


def _leaves(pipeline: Pipeline, profile: str, seed: int, o: Options) -> _Leaves:
    return prepare(
        pipeline,
        profile,
        rank=o.rank,
        alpha=o.alpha,
        dropout=o.dropout,
        lora_init=o.lora_init,
        text_encoder=o.text_encoder,
        joint_text=o.joint_text,
        initial=o.initial,
        seed=seed,
    )


def _order(dataset: Dataset, profile: str, seed: int, o: Options) -> list[tuple[Batch, np.ndarray]]:
    """The samples of every step, filled up to the batch size, and their weights in the loss."""
    sizes = data_lib.curriculum_stages(len(dataset), o.curriculum)
    steps = num_steps(profile, sizes, o.batch_size, o.steps, o.epochs, stages=o.stages)
    if (profile == "dreambooth") != (o.prior is not None):
        raise ValueError('`prior`, the number and weight of class pictures, belongs to the profile "dreambooth" alone.')
    if o.prior is not None:
        chosen = prior_lib.batches(o.prior, o.batch_size, steps, seed)
        return [(batch, prior_lib.weights(o.prior, batch.rows)) for batch in chosen]
    order = data_lib.curriculum_batches(sizes, o.batch_size, steps, seed, stages=o.stages, order=o.order)
    return [_filled(batch, o.batch_size) for batch in order]


def _prepare(pipeline: Pipeline, dataset: Dataset, profile: str, seed: int, o: Options) -> _Training:
    """Check all arguments, then encode images and captions, and place the weights on the devices."""
    mesh = o.mesh or mesh_lib.make()
    check_batch(o.batch_size, o.memory.accumulate or 1, mesh.size)
    told = backbones.on(pipeline, mesh)
    denoiser, trainable, frozen, keys = leaves = _leaves(told, profile, seed, o)
    filled = _order(dataset, profile, seed, o)
    way = _way(told, dataset, profile, o, mesh, leaves) if filled else Way()
    encoded = latents.Encoded(pipeline, dataset, [shown for shown, _ in filled], cache=o.latents_cache)
    encode = backbones.token_condition if denoiser.encoders else backbones.condition
    reading = words.read(pipeline, o.word) if profile == "textual_inversion" else pipeline
    condition = encode(reading, dataset.captions, size=encoded.size)
    step = train_step(memory_lib.program(denoiser, o.optimiser, o.objective, way, mesh))
    schedule = denoiser.backbone.noising.schedule(pipeline.configs["scheduler"])
    state = place_state(trainable, o.optimiser, o.objective.ema > 0, mesh, way.fsdp)
    frozen = mesh_lib.place(frozen, mesh, fsdp=way.fsdp)
    base = jax.random.key(seed)

    def numbered(state: Any, i: int) -> tuple[Any, Any]:
        shown, weight = filled[i]
        mean, std = encoded.batch(i).scaled(pipeline)
        texts, geometry = condition.rows(shown.rows), dataset.geometries(*shown)
        texts = texts if geometry is None else denoiser.backbone.cropped(texts, geometry)
        batch = {"mean": mean, "std": std, "condition": texts, "weight": weight}
        return step(state, frozen, keys, schedule, mesh_lib.split_batch(batch, mesh), jax.random.fold_in(base, i))

    return _Training(state, [shown.rows[weight > 0] for shown, weight in filled], numbered)


def _filled(shown: Batch, size: int) -> tuple[Batch, np.ndarray]:
    """A batch filled up to `size` with its last sample, and the weights of the samples in the loss, float32 [size].

    So a short batch runs the same program. The weights are equal and sum to 1, and those of the filling are 0.
    """
    count = len(shown.rows)
    weight = np.where(np.arange(size) < count, 1 / count, 0).astype(np.float32)
    return Batch(*(mesh_lib.pad_batch(each, size) for each in shown)), weight


def _result(profile: str, state: Any, o: Options) -> Adapted:
    return Adapted(profile, mesh_lib.to_host(state["ema"] if o.objective.ema else state["params"]), o.alpha, o.word)


class _Reports:
    """Reports of steps, passed on one step late, so that the host prepares a batch while the device works."""

    def __init__(self, on_step: Callable[[Progress], None] | None):
        self._on_step = on_step
        self._last: tuple[int, np.ndarray, Any] | None = None

    def add(self, i: int, rows: np.ndarray, report: Any) -> None:
        self.flush()
        self._last = i, rows, report

    def flush(self) -> None:
        """Read the last report, which waits for the device. Raises FloatingPointError if it is not finite."""
        if self._last is None:
            return
        i, rows, report = self._last
        self._last = None
        loss, grad_norm, rate = (float(x) for x in mesh_lib.to_host(report))
        if not np.isfinite([loss, grad_norm]).all():
            raise FloatingPointError(
                f"fine-tuning: loss {loss}, gradient norm {grad_norm} at step {i + 1} (samples {rows.tolist()}); "
                "check the weights and the data, or lower the learning rate."
            )
        if self._on_step:
            self._on_step(Progress(i + 1, loss, grad_norm, rate))


def num_steps(
    profile: str,
    curriculum: Sequence[int],
    batch_size: int,
    steps: int | None,
    epochs: int | None,
    *,
    stages: str = "nested",
) -> int:
    """The number of steps: `steps` if it is given, else as many as `epochs` passes over every stage take.

    curriculum: the cumulative sizes of the stages. With the paper's 1000, 3000 and 5000 in batches of 16, one pass over
    the stages takes 564 steps if they are nested, and 313 as increments.
    """
    protocols.check_profile(profile)
    if steps is None and epochs is None and profile not in EPOCHS:
        raise ValueError(f"profile {profile!r} is none of the paper's and has no default; give `steps` or `epochs`.")
    passes = EPOCHS.get(profile, 0) if epochs is None else epochs
    for name, value in (("steps", steps), ("epochs", passes)):
        if value is not None and value < 0:
            raise ValueError(f"{name} must not be negative, found {value}.")
    one_pass = sum(-(-len(rows) // batch_size) for rows in data_lib.stage_rows(curriculum, stages))
    return passes * one_pass if steps is None else steps


def check_batch(batch_size: int, accumulate: int, devices: int) -> None:
    """Raise ValueError for a batch that cannot be cut into so many parts on so many devices."""
    if batch_size < 1 or batch_size % devices:
        raise ValueError(f"batch_size {batch_size} is not a positive multiple of the {devices} devices.")
    if accumulate < 1 or batch_size % (accumulate * devices):
        raise ValueError(f"accumulate {accumulate} does not divide batch_size {batch_size} on {devices} devices.")


def prepare(
    pipeline: Pipeline,
    profile: str,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    seed: int,
    lora_init: str = "kaiming",
    text_encoder: bool = False,
    joint_text: bool = False,
    initial: str = "",
) -> tuple[Denoiser, Params, Params, Params]:
    """(denoiser, trainable leaves, frozen leaves, dropout keys) of a profile; options as in `Options`.

    Raises ValueError if `text_encoder`, `joint_text` or a new word is asked of a profile or of a backbone that does not
    train it.
    """
    denoiser = backbones.denoiser(pipeline)
    text_encoder = text_encoder or profile == "lora_text"
    if text_encoder:
        _check_text_encoder(denoiser.backbone, profile)
    if joint_text and profile != "lite":
        raise ValueError(f'joint_text adapts the text stream under the profile "lite" only, found {profile!r}.')
    params: Params = denoiser.backbone.weights(pipeline)
    keys: Params = {}
    if profile == "textual_inversion":
        denoiser, params = _with_new_word(pipeline, denoiser, params, initial)
    if profile in profiles.WITH_ADAPTERS:
        attach = functools.partial(
            lora.attach, rank=rank, alpha=alpha, dropout=dropout, init=lora_init, dora=profile == "dora"
        )
        targets = _with_text_stream(denoiser.backbone) if joint_text else None
        definition, params = attach(denoiser.definition, params, seed=seed, targets=targets)
        denoiser = denoiser.with_definition(definition)
        if text_encoder:
            denoiser, params = _with_text_encoders(pipeline, denoiser, params, attach, seed)
        params, keys = lora.split_keys(params)
    trainable, frozen = params_lib.partition(params, profiles.mask(params, profile))
    return denoiser, trainable, frozen, keys


def _with_text_stream(backbone: Backbone) -> re.Pattern:
    """The kernels of the profile "lite", and those of text tokens in joint attention."""
    image, text = (backbone.require(region, "joint_text") for region in ("lora", "lora_text"))
    return re.compile(f"{image.pattern}|{text.pattern}")


def _with_text_encoders(
    pipeline: Pipeline, denoiser: Denoiser, params: Params, attach: Callable[..., Any], seed: int
) -> tuple[Denoiser, Params]:
    """The denoiser and its parameters, together with the text encoders and theirs, adapters attached."""
    text = denoiser.backbone.text
    assert text is not None
    definitions: list[Definition] = []
    for i, name in enumerate(text.encoders):
        key = jax.random.fold_in(jax.random.key(seed), i)
        definition, own = attach(pipeline.definitions[name], pipeline.params[name], seed=key, targets=text.lora)
        definitions.append(definition)
        params = params | {name: own}
    return denoiser._replace(encoders=tuple(definitions)), params


def _with_new_word(pipeline: Pipeline, denoiser: Denoiser, params: Params, initial: str) -> tuple[Denoiser, Params]:
    """The denoiser and its parameters, together with the text encoder and its own, a new word attached."""
    if denoiser.backbone.text is None or denoiser.backbone.text.encoders != (words.ENCODER,):
        raise ValueError(f"textual_inversion trains a word of one CLIP encoder; {denoiser.backbone.name} has others.")
    definition, own = words.attach(pipeline, initial)
    return denoiser._replace(encoders=(definition,)), params | {words.ENCODER: own}


def _check_text_encoder(backbone: Backbone, profile: str) -> None:
    if profile not in ("lite", "lora_text"):
        raise ValueError(
            f'text_encoder adapts the text encoder under the profile "lite" only, found {profile!r}: the paper '
            "(section 4.1) trains the text encoder there, and the UNet alone under the other profiles."
        )
    if backbone.text is None:
        raise ValueError(f"text_encoder: {backbone.name} has no text encoders that can be trained; leave it off.")
