"""The training loop: resumed, split, watched and preempted runs end where the plain run ends."""

import copy
import dataclasses
import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from safetensors.numpy import save_file

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import convert
from spqr_jax import data, finetune
from spqr_jax import params as params_lib
from spqr_jax.backbones.models.remat import rematerialised
from spqr_jax.devices import preemption
from spqr_jax.finetune import Memory
from spqr_jax.training import latents
from spqr_jax.training.log import TrainingLog
from spqr_jax.training.prior import Prior
from spqr_jax.training.step import clip as clipped
from tests import tiny

CAPTIONS = ["a cat", "the dog", "a cat eats", "do", "dog and cat", ""]


@pytest.fixture(scope="module")
def pipeline(reference):
    return convert.load(reference("sd1")[1])


@pytest.fixture(scope="module")
def dataset() -> data.Dataset:
    images = np.random.default_rng(0).integers(0, 256, (len(CAPTIONS), 16, 16, 3), np.uint8)
    return data.from_arrays(images, CAPTIONS)


OPTIONS = {
    "seed": 3,
    "steps": 6,
    "batch_size": 4,
    "optimiser": finetune.Optimiser(lr=1e-3, warmup_steps=2),
    "rank": 4,
}


def train(pipeline, dataset, profile="moderate", **options):
    return finetune.train(pipeline, dataset, profile, **OPTIONS | options)


@pytest.fixture(scope="module")
def plain(pipeline, dataset):
    return {profile: train(pipeline, dataset, profile) for profile in ("lite", "moderate")}


def same(a, b) -> bool:
    a, b = params_lib.flatten(a.leaves), params_lib.flatten(b.leaves)
    return a.keys() == b.keys() and all(np.array_equal(a[path], b[path]) for path in a)


class Killed(Exception):
    pass


@pytest.mark.parametrize("profile", ["lite", "moderate"])
def test_a_killed_run_continues_to_the_same_bits(pipeline, dataset, plain, tmp_path, profile):
    """Killed twice, with dropout on in the adapters; every step is taken once after the last saved state."""
    seen: list[int] = []

    def kill_after(step):
        def watch(progress):
            seen.append(progress.step)
            if progress.step == step:
                raise Killed

        return watch

    options = {"checkpoints": tmp_path / "training", "checkpoint_every": 2}
    for step in (3, 5):
        with pytest.raises(Killed):
            train(pipeline, dataset, profile, on_step=kill_after(step), **options)
    assert same(train(pipeline, dataset, profile, on_step=kill_after(99), **options), plain[profile])
    assert seen == [1, 2, 3, 3, 4, 5, 5, 6]


def cropped_afresh(number: int = 0) -> data.Dataset:
    """Crops of 16x16 pixels out of larger images, other ones in every pass, and with each its own geometry."""
    images = np.random.default_rng(0).integers(0, 256, (len(CAPTIONS), 40, 40, 3), np.uint8)
    corners = np.random.default_rng(number).integers(0, 25, (len(CAPTIONS), 2))

    def cut(rows):
        return np.stack(
            [
                images[row, top : top + 16, left : left + 16]
                for row, (top, left) in zip(rows, corners[rows], strict=True)
            ]
        )

    def geometry(rows):
        return np.concatenate([np.full((len(rows), 2), 40), corners[rows]], axis=1)

    return data.Dataset(tuple(CAPTIONS), cut, f"crops {number}", geometry, cropped_afresh)


@pytest.mark.parametrize("plan", [{}, {"curriculum": (2, 6), "stages": "increments", "order": "file"}])
def test_fresh_crops_are_the_same_when_resumed_and_when_read(pipeline, tmp_path, monkeypatch, plan):
    """Killed after the first pass; the second subject of a sweep reads what the first has encoded."""
    whole = train(pipeline, cropped_afresh(), **plan)
    assert not same(whole, train(pipeline, dataclasses.replace(cropped_afresh(), at_pass=None), **plan))
    options = plan | {"checkpoints": tmp_path / "training", "checkpoint_every": 2}

    def kill(progress):
        if progress.step == 4:
            raise Killed

    with pytest.raises(Killed):
        train(pipeline, cropped_afresh(), on_step=kill, **options)
    assert same(train(pipeline, cropped_afresh(), **options), whole)
    assert same(train(pipeline, cropped_afresh(), latents_cache=tmp_path / "latents", **plan), whole)
    monkeypatch.setattr(latents, "encode_batch", lambda *_: pytest.fail("encoded again"))
    assert same(train(pipeline, cropped_afresh(), latents_cache=tmp_path / "latents", **plan), whole)


def test_asked_to_stop_it_saves_the_step_and_exits_for_the_scheduler(pipeline, dataset, plain, tmp_path, monkeypatch):
    monkeypatch.setattr(preemption, "requested", type(preemption.requested)())
    handler = signal.getsignal(signal.SIGTERM)
    preemption.listen()
    try:
        with pytest.raises(SystemExit) as stopped:
            train(
                pipeline,
                dataset,
                checkpoints=tmp_path / "training",
                on_step=lambda p: os.kill(os.getpid(), signal.SIGTERM) if p.step == 2 else None,
            )
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert stopped.value.code == 143
    monkeypatch.setattr(preemption, "requested", type(preemption.requested)())
    seen = []
    assert same(
        train(pipeline, dataset, checkpoints=tmp_path / "training", on_step=lambda p: seen.append(p.step)),
        plain["moderate"],
    )
    assert seen == [4, 5, 6]


def test_a_damaged_state_is_named(pipeline, dataset, tmp_path):
    options = {"checkpoints": tmp_path / "training", "checkpoint_every": 2}
    train(pipeline, dataset, **options)
    for file in (tmp_path / "training").rglob("*"):
        if file.is_file() and "ocdbt" in str(file):
            file.write_bytes(b"")
    with pytest.raises(ValueError, match="training is damaged"):
        train(pipeline, dataset, **options)


def relative_distance(a, b, start) -> float:
    """The distance between two results, as a share of the way that the second has gone from `start`."""
    a, b, start = (params_lib.flatten(leaves) for leaves in (a, b, start))
    assert a.keys() == b.keys()
    moved = np.sqrt(sum(np.square(b[path] - start[path]).sum() for path in b))
    apart = np.sqrt(sum(np.square(a[path] - b[path]).sum() for path in b))
    assert moved > 0
    return apart / moved


@pytest.mark.parametrize("memory", [Memory(accumulate=2), pytest.param(Memory(remat=True), marks=pytest.mark.slow)])
def test_memory_options_change_nothing_but_rounding(pipeline, dataset, plain, memory):
    losses = []
    options = {"memory": memory, "on_step": lambda p: losses.append((p.loss, p.grad_norm))}
    ours = train(pipeline, dataset, **options)
    assert relative_distance(ours.leaves, plain["moderate"].leaves, pipeline.params["unet"]) <= 1e-3
    assert len(losses) == 6


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_drops_the_same_inputs(pipeline, dataset, plain, parts):
    """A sample's dropout mask depends on its place in the batch, and not on the part that it is computed in."""
    ours = train(pipeline, dataset, "lite", memory=Memory(accumulate=parts))
    start = train(pipeline, dataset, "lite", steps=0)
    assert relative_distance(ours.leaves, plain["lite"].leaves, start.leaves) <= 1e-3


INCREMENTS = {"curriculum": (3, 6), "stages": "increments", "steps": None, "epochs": 2}


def test_short_batches_compile_no_second_program(pipeline, dataset, monkeypatch):
    """Six steps with 2, 1, 2, 1 and so on samples of 2, in one program; the log names the samples that were there."""
    made = []
    make = finetune.train_step
    monkeypatch.setattr(finetune, "train_step", lambda program: made.append(make(program)) or made[-1])
    train(pipeline, dataset, "moderate", batch_size=2, **INCREMENTS | {"order": "file"})
    (step,) = made
    compiled = step._cache_size()
    train(pipeline, dataset, "moderate", batch_size=2)
    assert step is made[1] and step._cache_size() == compiled


def test_lora_text_is_lite_with_the_text_encoder(pipeline):
    """So what is compared with PEFT under `lite` with `text_encoder` holds for the profile by its own name."""
    options = {"rank": 4, "alpha": 8.0, "dropout": 0.1, "seed": 3}
    named = finetune.prepare(pipeline, "lora_text", **options)
    asked = finetune.prepare(pipeline, "lite", text_encoder=True, **options)
    assert named[0] == asked[0]
    for ours, theirs in zip(named[1:], asked[1:], strict=True):
        ours, theirs = params_lib.flatten(ours), params_lib.flatten(theirs)
        assert ours.keys() == theirs.keys() and all(np.array_equal(ours[path], theirs[path]) for path in ours)
    assert any(path.startswith("text_encoder.") for path in params_lib.flatten(named[1]))


@pytest.mark.parametrize("profile", ["dreambooth", "textual_inversion", "dora"])
def test_an_adaptation_that_is_killed_continues_to_the_same_bits(pipeline, dataset, tmp_path, profile):
    options: dict = {"prior": Prior(2, 4, 0.5)} if profile == "dreambooth" else {}
    options |= {"word": "<new>", "initial": "cat"} if profile == "textual_inversion" else {}
    whole = train(pipeline, dataset, profile, **options)
    saved = {"checkpoints": tmp_path / "training", "checkpoint_every": 2}

    def kill(progress):
        if progress.step == 4:
            raise Killed

    with pytest.raises(Killed):
        train(pipeline, dataset, profile, on_step=kill, **saved, **options)
    assert same(train(pipeline, dataset, profile, **saved, **options), whole)
    start = train(pipeline, dataset, profile, **options | {"steps": 0})
    assert not same(start, whole) and start.profile == profile


@pytest.mark.parametrize(
    ("profile", "options", "message"),
    [
        ("dreambooth", {}, '`prior`, the number and weight of class pictures, belongs to the profile "dreambooth"'),
        ("moderate", {"prior": Prior(2, 4)}, '`prior`, .* belongs to the profile "dreambooth" alone'),
        ("dora", {"steps": None}, "profile 'dora' is none of the paper's and has no default; give `steps` or `epochs`"),
        ("textual_inversion", {"word": "<new>", "initial": "a cat"}, "a word of one token, found 'a cat' of 2"),
        ("textual_inversion", {"word": "cat", "initial": "cat"}, "'cat' cannot be added: it is a token already"),
        ("adapter:x", {}, "profile 'adapter:x' is unknown; expected one of lite, moderate, standard, dora"),
    ],
)
def test_adaptations_that_cannot_work_are_refused_before_any_step(pipeline, dataset, profile, options, message):
    with pytest.raises(ValueError, match=message):
        train(pipeline, dataset, profile, **options, on_step=lambda _: pytest.fail("a step was made"))


def test_a_run_that_is_killed_within_a_stage_continues_to_the_same_bits(tmp_path):
    """On increments in shuffled order, killed before the short batch that ends the first pass of the second stage."""
    pipeline, dataset = tiny.pipeline(real=False), tiny.dataset()
    options = {"batch_size": 4, "curriculum": (6, 16), "stages": "increments", "steps": None, "epochs": 2}
    rows: list[int] = []

    def kill(progress):
        rows.append(progress.step)
        if progress.step == 6:
            raise Killed

    whole = train(pipeline, dataset, "standard", **options)
    saved = {"checkpoints": tmp_path / "training", "checkpoint_every": 5}
    with pytest.raises(Killed):
        train(pipeline, dataset, "standard", on_step=kill, **saved, **options)
    assert same(train(pipeline, dataset, "standard", **saved, **options), whole)
    assert rows == [1, 2, 3, 4, 5, 6]


def test_remat_keeps_fewer_bytes(pipeline):
    """What the forward pass keeps for the backward pass, by the trace; XLA undoes it for CPUs only."""
    definition, unet = pipeline.definitions["unet"], pipeline.params["unet"]
    x, t, context = np.zeros((8, 8, 8, 4), np.float32), np.zeros(8, np.int32), np.zeros((8, 77, 32), np.float32)

    def kept(params):
        return jax.vjp(lambda p: definition.bind(p)(x, t, context).sum(), params)[1]

    plain = params_lib.nbytes(jax.eval_shape(kept, unet))
    with rematerialised():
        less = params_lib.nbytes(jax.eval_shape(lambda p: kept(p), unet))
    assert less < 0.5 * plain


@pytest.mark.slow
@pytest.mark.parametrize("size", [0.5, 3.0])
def test_gradients_are_clipped_as_torch_clips_them(size):
    grads = {name: np.random.default_rng(i).standard_normal(50).astype(np.float32) for i, name in enumerate("ab")}
    norm = np.sqrt(sum(np.square(grad).sum() for grad in grads.values()))
    grads = {name: grad * np.float32(size / norm) for name, grad in grads.items()}
    theirs = {name: torch.zeros(50, requires_grad=True) for name in grads}
    for name, leaf in theirs.items():
        leaf.grad = torch.from_numpy(grads[name].copy())
    torch.nn.utils.clip_grad_norm_(list(theirs.values()), 1.0)
    clip = clipped(1.0)
    ours, _ = clip.update(grads, clip.init(grads))
    for name, grad in ours.items():
        np.testing.assert_allclose(grad, theirs[name].grad.numpy(), rtol=2e-6)


def test_clipping_keeps_no_second_set_of_gradients():
    params = {str(i): jax.ShapeDtypeStruct((256, 256), np.float32) for i in range(40)}
    adamw = optax.adamw(1e-4)

    def temporary_bytes(transform):
        def step(grads, state, params):
            updates, state = transform.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        state = jax.eval_shape(transform.init, params)
        compiled = jax.jit(step, donate_argnums=(1, 2)).lower(params, state, params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    ours = temporary_bytes(optax.chain(clipped(1.0), adamw))
    assert ours < 0.9 * temporary_bytes(optax.chain(optax.clip_by_global_norm(1.0), adamw))


def test_bfloat16_is_mixed_precision(pipeline, dataset):
    """Master weights and optimiser state stay float32, so that steps below bfloat16's resolution still add up."""
    low = pipeline._replace(params={name: params_lib.cast(p, "bfloat16") for name, p in pipeline.params.items()})
    losses = [[], []]
    tuned = [train(p, dataset, on_step=lambda r, i=i: losses[i].append(r.loss)) for i, p in enumerate((pipeline, low))]
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(tuned[1].leaves)} == {"float32"}
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.03)
    adapted = params_lib.flatten(finetune.apply(low, tuned[1]).params["unet"])
    assert {str(leaf.dtype) for leaf in adapted.values()} == {"bfloat16"}


def test_evaluation_sees_the_weights_of_its_step(pipeline, dataset, plain):
    seen = {}
    train(pipeline, dataset, eval_at=(0, 2, 6), on_eval=lambda step, p: seen.__setitem__(step, p.params["unet"]))
    flat = {step: params_lib.flatten(unet) for step, unet in seen.items()}
    leaf = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.kernel"
    assert list(seen) == [0, 2, 6]
    assert np.array_equal(flat[0][leaf], params_lib.flatten(pipeline.params["unet"])[leaf])
    assert np.array_equal(flat[6][leaf], params_lib.flatten(plain["moderate"].leaves)[leaf])
    two = finetune.train(pipeline, dataset, "moderate", **OPTIONS | {"steps": 2})
    assert np.array_equal(flat[2][leaf], params_lib.flatten(two.leaves)[leaf])


def test_the_log_has_a_line_a_step(pipeline, dataset, tmp_path):
    with TrainingLog(tmp_path, batch_size=4) as log:
        train(pipeline, dataset, on_step=log)
    lines = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite(list(line.values())).all() and line["samples_per_s"] > 0 for line in lines)
    np.testing.assert_allclose([line["lr"] for line in lines], [0, 5e-4, 1e-3, 1e-3, 1e-3, 1e-3], rtol=1e-6)


def test_tensorboards_files_need_no_torch(tmp_path):
    """PyTorch is installed here. It is not imported for the log, and can be imported after it."""
    pytest.importorskip("tensorboardX")
    code = """
import sys
from pathlib import Path
from spqr_jax.training.log import Progress, TrainingLog

with TrainingLog(Path(sys.argv[1]), batch_size=4) as log:
    log(Progress(1, 0.5, 1.0, 1e-4))
assert "torch" not in sys.modules
import torch
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120)
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_latents_are_encoded_once(pipeline, dataset, tmp_path, monkeypatch):
    first = latents.encode(pipeline, dataset, cache=tmp_path)
    monkeypatch.setattr(latents, "encode_batch", lambda *_: pytest.fail("encoded again"))
    again = latents.encode(pipeline, dataset, cache=tmp_path)
    assert np.array_equal(first.mean, again.mean) and np.array_equal(first.logvar, again.logvar)
    with pytest.raises(pytest.fail.Exception):
        latents.encode(pipeline, data.Dataset(dataset.captions, dataset.images, "others"), cache=tmp_path)
    other = pipeline.with_params(vae=params_lib.map_with_path(lambda _, x: x + 1, pipeline.params["vae"]))
    with pytest.raises(pytest.fail.Exception):
        latents.encode(other, dataset, cache=tmp_path)


@pytest.fixture(scope="module")
def with_text(pipeline, dataset):
    return train(pipeline, dataset, "lite", text_encoder=True)


@pytest.mark.parametrize("text_encoder", [False, True])
def test_a_saved_adapter_loads_in_diffusers(reference, pipeline, plain, with_text, tmp_path, text_encoder):
    """The adapter file gives diffusers the weights that we merge, those of the text encoder too."""
    adapted = with_text if text_encoder else plain["lite"]
    save_file(finetune.adapter_file(pipeline, adapted), tmp_path / "adapter.safetensors")
    theirs = copy.deepcopy(reference("sd1")[0])
    before = {name: copy.deepcopy(getattr(theirs, name).state_dict()) for name in ("unet", "text_encoder")}
    theirs.load_lora_weights(str(tmp_path), weight_name="adapter.safetensors")
    theirs.fuse_lora()
    theirs.unload_lora_weights()
    tuned = finetune.apply(pipeline, adapted)
    for component, weights in before.items():
        ours = convert.rename.into_torch(tuned.params[component])
        ours = {name.removeprefix("text_model."): weight for name, weight in ours.items()}  # as transformers 5 does
        for name, weight in getattr(theirs, component).state_dict().items():
            torch.testing.assert_close(torch.tensor(np.asarray(ours[name])), weight, rtol=1e-4, atol=1e-6)
        moved = [not torch.equal(torch.tensor(np.asarray(ours[name])), weight) for name, weight in weights.items()]
        assert any(moved) == (component == "unet" or text_encoder)


def test_accumulation_with_the_text_encoder(pipeline, dataset, with_text):
    ours = train(pipeline, dataset, "lite", text_encoder=True, memory=Memory(accumulate=2))
    start = train(pipeline, dataset, "lite", text_encoder=True, steps=0)
    assert relative_distance(ours.leaves, with_text.leaves, start.leaves) <= 1e-3
    text = params_lib.flatten(ours.leaves["text_encoder"])
    assert text and all(np.abs(leaf).max() > 0 for path, leaf in text.items() if path.endswith("lora_B.kernel"))


def test_the_text_encoders_adapters_start_apart_from_the_denoisers(pipeline):
    options = {"rank": 4, "alpha": 4.0, "dropout": 0.0, "seed": 3}
    alone, both = (
        params_lib.flatten(finetune.prepare(pipeline, "lite", text_encoder=on, **options)[1]) for on in (False, True)
    )
    assert all(np.array_equal(both[path], leaf) for path, leaf in alone.items())
    added = {path: leaf for path, leaf in both.items() if path not in alone}
    assert len(added) == 2 * 4 * pipeline.configs["text_encoder"]["num_hidden_layers"]
    firsts = {np.asarray(leaf).ravel()[:8].tobytes() for path, leaf in both.items() if path.endswith("lora_A.kernel")}
    assert len(firsts) == len(both) / 2, "two layers start with the same numbers"
