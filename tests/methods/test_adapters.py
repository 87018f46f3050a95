"""Methods that learn adapters, SPM and Modular LoRA: losses and gradients against PyTorch with hooks on the layers."""

import re

import jax
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch")

import convert
from spqr_jax import backbones
from spqr_jax import params as params_lib
from spqr_jax.backbones import Condition
from spqr_jax.backbones.stable_diffusion import STABLE_DIFFUSION
from spqr_jax.methods import Concept, modular_lora, spm
from spqr_jax.methods.spm import Membrane, Restarts
from spqr_jax.methods.tools import closed_form, loop, low_rank, negative_guidance
from spqr_jax.methods.tools.loop import Adam
from spqr_jax.methods.tools.low_rank import Added, LowRank
from spqr_jax.sampling import attached, partial
from spqr_jax.sampling.attached.delta import Delta, add

FLAT = params_lib.flatten
TRANSFORMER, LORA = STABLE_DIFFUSION.regions.transformer, STABLE_DIFFUSION.regions.lora
CONCEPT = Concept("cat", ("cat",))
SPM_OPTIONS = {"steps": 2, "sampling_steps": 3, "eighths": (8,), "warmup": 0}
SPM_ADAM = Adam(Restarts(1e-4, 0, 2, 3), weight_decay=0.01)
MODULAR_OPTIONS = {"steps": 2, "sampling_steps": 3}
MODULAR_ADAM = Adam(1e-4, weight_decay=0.01)


@pytest.fixture(scope="module")
def pipeline(reference):
    return convert.load(reference("sd1")[1])


@pytest.fixture(scope="module")
def unet(pipeline):
    return loop.on_device(pipeline.params["unet"])


def filled(adapter, seed=0):
    """The adapter with random `up`, so that every factor has a gradient."""
    rng = np.random.default_rng(seed)
    return {p: LowRank(a.down, 0.3 * rng.standard_normal(a.up.shape).astype(np.float32)) for p, a in adapter.items()}


def loss_and_gradient(gradient, static, adam, params, *inputs):
    """From one step of the program that `align` runs: after it, Adam's first moment is a tenth of the gradient."""
    update, state = loop.compiled(gradient, static, adam), loop.transform(adam).init(params)
    _, state, (loss, _) = update(params, state, None, *inputs)
    return float(loss), jax.tree.map(lambda m: np.asarray(m) / np.float32(0.1), optax.tree_utils.tree_get(state, "mu"))


class Hooked:
    """PyTorch's UNet with factors added to the outputs of its layers while `on` is true."""

    def __init__(self, unet, adapter, scale):
        self.unet, self.on, self.factors, self.handles = unet, True, {}, []
        for path, factors in adapter.items():
            down, up = (torch.tensor(np.reshape(f, f.shape[-2:]), requires_grad=True) for f in factors)
            self.factors[path] = (down, up)

            def hook(module, args, output, down=down, up=up):
                if not self.on:
                    return output
                product = "bchw,cr,ro->bohw" if isinstance(module, torch.nn.Conv2d) else "blc,cr,ro->blo"
                return output + scale * torch.einsum(product, args[0], down, up)

            self.handles.append(unet.get_submodule(path.removesuffix(".kernel")).register_forward_hook(hook))

    def __call__(self, latents, t, context, *, on, **added):
        self.on = on
        count = len(context)
        latents = torch.tensor(np.asarray(latents).transpose(0, 3, 1, 2)).repeat(count, 1, 1, 1)
        t, context = torch.tensor(t).repeat(count), torch.tensor(context)
        with torch.set_grad_enabled(on):
            return self.unet(latents, t, context, **added).sample

    def check(self, loss, ours, ours_gradient):
        loss.backward()
        loss = loss.detach()
        for handle in self.handles:
            handle.remove()
        assert ours == pytest.approx(float(loss), rel=1e-4)
        for path, pair in self.factors.items():
            for found, factor in zip(ours_gradient[path], pair, strict=True):
                expected = factor.grad.numpy()
                assert np.abs(expected).max() > 0
                assert np.abs(found.reshape(expected.shape) - expected).max() <= 1e-4 * np.abs(expected).max(), path


def random_inputs(seed, texts):
    rng = np.random.default_rng(seed)
    latents = rng.standard_normal((1, 8, 8, 4)).astype(np.float32)
    return latents, np.array([431], np.int32), rng.standard_normal((texts, 77, 32)).astype(np.float32)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_spm_adapts_every_layer_of_the_transformers(reference, family):
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    pipeline = convert.load(reference(family)[1])
    adapter = low_rank.create(pipeline.params["unet"], TRANSFORMER, rank=1, seed=0)
    expected = {
        f"{outer}.{name}.kernel"
        for outer, block in reference(family)[0].unet.named_modules()
        if isinstance(block, Transformer2DModel)
        for name, layer in block.named_modules()
        if isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d))
    }
    assert set(adapter) == expected and (family != "sd1" or len(adapter) == 12 * 4)
    assert all(not factors.up.any() for factors in adapter.values())
    for path, factors in adapter.items():
        assert np.abs(factors.down).max() <= FLAT(pipeline.params["unet"])[path].shape[-2] ** -0.5


def test_an_adapter_beside_the_weights_computes_what_merged_kernels_do(pipeline, unet):
    adapter = filled(low_rank.create(pipeline.params["unet"], TRANSFORMER, rank=2, seed=1))
    denoiser, (latents, t, texts) = backbones.denoiser(pipeline), random_inputs(2, 1)
    student = spm.Static(denoiser, 0.5).student
    beside = student.bind((unet, adapter))(latents, t, Condition(texts))
    merged = denoiser.bind(Added(0.5)(unet, adapter))(latents, t, Condition(texts))
    unchanged = denoiser.bind(unet)(latents, t, Condition(texts))
    assert np.abs(merged - unchanged).max() > 1e-2 * np.abs(merged).max()
    assert np.abs(beside - merged).max() <= 1e-5 * np.abs(merged).max()


def test_spm_loss_and_gradient_equal_pytorch(pipeline, unet, reference):
    """The anchoring term over the authors' batch as it is: "", a, "", a'."""
    adapter = filled(low_rank.create(pipeline.params["unet"], TRANSFORMER, rank=1, seed=1))
    latents, t, texts = random_inputs(2, 5)
    target, neutral, empty, first, second = texts
    told = Condition(np.stack([target, neutral, empty, first, second]))
    inputs = (unet, latents, t, told, np.float32(1.5), np.float32(1000))
    static = spm.Static(backbones.denoiser(pipeline), 1.0)
    found = loss_and_gradient(spm.GRADIENT, static, SPM_ADAM, adapter, *inputs)

    model = Hooked(reference("sd1")[0].unet, adapter, 1.0)
    with_text, without = model(latents, t, np.stack([target, neutral]), on=False)
    anchors = np.stack([empty, first, empty, second])
    mse = torch.nn.functional.mse_loss
    erase = mse(model(latents, t, target[None], on=True)[0], without - 1.5 * (with_text - without))
    anchored = mse(model(latents, t, anchors, on=True), model(latents, t, anchors, on=False))
    model.check(erase + 1000 * anchored, *found)


@pytest.mark.slow
def test_spm_loss_and_gradient_equal_pytorch_on_sdxl(reference):
    """Pooled states and sizes too; the four anchors as the authors batch them."""
    xl = convert.load(reference("sdxl")[1])
    unet = loop.on_device(xl.params["unet"])
    adapter = filled(low_rank.create(unet, TRANSFORMER, rank=1, seed=1))
    states, rng = backbones.condition(xl, ["cat", "", ""]), np.random.default_rng(0)
    told = backbones.of(xl).resized(spm.with_anchors(jax.tree.map(np.asarray, states), rng), (16, 24))
    assert told.pooled.shape[0] == 5 and told.time_ids.tolist() == [[16, 24, 0, 0, 16, 24]] * 5
    latents, t, _ = random_inputs(2, 1)
    static = spm.Static(backbones.denoiser(xl), 1.0)
    inputs = (unet, latents, t, told, np.float32(1.5), np.float32(1000))
    found = loss_and_gradient(spm.GRADIENT, static, SPM_ADAM, adapter, *inputs)

    model = Hooked(reference("sdxl")[0].unet, adapter, 1.0)

    def predict(rows, on):
        sizes = torch.tensor(told.time_ids[rows])
        added = {"text_embeds": torch.tensor(told.pooled[rows]), "time_ids": sizes}
        return model(latents, t, told.context[rows], on=on, added_cond_kwargs=added)

    with_text, without = predict([0, 1], False)
    mse = torch.nn.functional.mse_loss
    erase = mse(predict([0], True)[0], without - 1.5 * (with_text - without))
    model.check(erase + 1000 * mse(predict([2, 3, 2, 4], True), predict([2, 3, 2, 4], False)), *found)


@pytest.mark.slow
def test_spm_on_sdxl_changes_its_layers_only(reference):
    xl = convert.load(reference("sdxl")[1])
    aligned = spm.align(xl, CONCEPT, steps=1, sampling_steps=2, warmup=0)
    before, after = FLAT(xl.params["unet"]), FLAT(aligned.params["unet"])
    changed = {path for path, leaf in before.items() if not np.array_equal(leaf, after[path])}
    assert changed and changed <= {path for path in before if TRANSFORMER.search(path)}


def test_spm_trains_at_the_authors_timestep(pipeline, monkeypatch):
    """After T' of 30 steps of the adapted model's sample, of any side from half the full one to below it, 64 pixels
    apart: t = 999 - T' 1000 / 30."""
    pipeline = pipeline._replace(configs=pipeline.configs | {"unet": pipeline.configs["unet"] | {"sample_size": 256}})
    drawn = []

    def partial_sample(denoiser, unet, tables, noise, given, done, guided):
        drawn.append((unet, noise.shape, done))

    def fit(name, gradient, static, adam, params, inputs, steps, frozen=(), **_):
        student = {path: LowRank(a.down, a.up + 1) for path, a in params.items()}
        for i in range(steps):
            _, t, *_ = inputs(i, student, *frozen)
            unet, shape, done = drawn[-1]
            assert t.tolist() == [999 - done * 1000 // 30] and 1 <= done <= 29
            assert shape[0] == 1 and {int(side) for side in shape[1:3]} <= {128, 160, 192, 224}
        weights, sampled = unet
        assert weights is frozen[0] and sampled is student
        return params

    monkeypatch.setattr(partial, "partial_sample", partial_sample)
    monkeypatch.setattr(loop, "fit", fit)
    spm.train(pipeline, "cat", steps=60)
    assert len({done for *_, done in drawn}) > 20 and len({shape for _, shape, _ in drawn}) > 8


def test_modular_lora_loss_and_gradient_equal_pytorch(pipeline, unet, reference):
    """ESD's loss through adapters of scale alpha / rank = 1, the frozen model without them."""
    adapter = filled(low_rank.create(pipeline.params["unet"], LORA, rank=4, seed=3))
    latents, t, texts = random_inputs(4, 2)
    told = [Condition(text[None]) for text in texts]
    static = negative_guidance.Static(backbones.denoiser(pipeline), Added(1.0))
    inputs = (unet, latents, t, *told, np.float32(1))
    found = loss_and_gradient(negative_guidance.GRADIENT, static, MODULAR_ADAM, adapter, *inputs)

    model = Hooked(reference("sd1")[0].unet, adapter, 1.0)
    with_text, without = model(latents, t, texts, on=False)
    loss = torch.nn.functional.mse_loss(model(latents, t, texts[:1], on=True)[0], 2 * without - with_text)
    model.check(loss, *found)


def test_modular_lora_attaches_what_the_merged_arm_adds(pipeline):
    """The weights stay, to the bit and by identity; only the projections of attention receive a change."""
    modular = modular_lora.align(pipeline, CONCEPT, seed=5, **MODULAR_OPTIONS)
    assert modular.params is pipeline.params
    targets = {p for p in FLAT(pipeline.params["unet"]) if LORA.search(p)}
    delta = FLAT(attached.find(modular, Delta).kernels)
    assert set(delta) == targets and all(np.abs(change).max() > 0 for change in delta.values())
    merged = modular_lora.align(pipeline, CONCEPT, seed=5, merged=True, **MODULAR_OPTIONS)
    assert merged.attached == ()
    for path, leaf in FLAT(merged.params["unet"]).items():
        base = FLAT(pipeline.params["unet"])[path]
        np.testing.assert_array_equal(leaf, base + delta[path] if path in delta else base)
    twice = modular_lora.align(modular, CONCEPT, seed=5, **MODULAR_OPTIONS)
    path = next(iter(targets))
    np.testing.assert_array_equal(FLAT(attached.find(twice, Delta).kernels)[path], 2 * delta[path])


def test_spm_merges_into_its_layers_only(pipeline):
    aligned = spm.align(pipeline, CONCEPT, seed=6, **SPM_OPTIONS)
    before, after = FLAT(pipeline.params["unet"]), FLAT(aligned.params["unet"])
    changed = {path for path, leaf in before.items() if not np.array_equal(leaf, after[path])}
    assert changed == {path for path in before if TRANSFORMER.search(path)}
    membrane = spm.train(pipeline, "cat", seed=6, **SPM_OPTIONS)
    assert membrane.target == "cat" and set(membrane.adapter) == changed
    for path, (down, up) in membrane.adapter.items():
        np.testing.assert_allclose(after[path] - before[path], down @ up, atol=1e-6)


def test_learning_rate_is_transformers():
    from transformers import get_cosine_with_hard_restarts_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-4)
    schedule = get_cosine_with_hard_restarts_schedule_with_warmup(optimizer, 5, 40, num_cycles=3)
    expected = []
    for _ in range(42):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    found = [float(Restarts(2e-4, 5, 40, 3)(np.int32(step))) for step in range(42)]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-9)


def test_anchors_have_the_targets_size():
    target = np.random.default_rng(0).standard_normal((77, 32))
    anchors = spm.random_anchors(np.random.default_rng(1), target, 50)
    ratio = np.linalg.norm(anchors, axis=(1, 2)) / np.linalg.norm(target)
    assert 0.8 <= ratio.min() < 0.9 and 1.1 < ratio.max() <= 1.2
    # In one dimension the cosine is 1 or -1: those along the target are never kept.
    assert (spm.random_anchors(np.random.default_rng(2), np.ones((1, 1)), 20) < 0).all()


def test_a_prompt_switches_a_membrane_on(pipeline):
    """gamma from its definition, and both ways of using it with two membranes, in float64."""
    states = closed_form.text_states(pipeline, ["a dog eats", "cat dog"])
    cosine = (states[0] * states[1]).sum() / np.sqrt((states[0] ** 2).sum() * (states[1] ** 2).sum())
    assert spm.permeability(pipeline, "a dog eats", "cat dog") == pytest.approx(max(cosine, 0.5), rel=1e-6)
    assert spm.permeability(pipeline, "the cat", "cat") == 1.0
    unet = pipeline.params["unet"]
    membranes = [
        Membrane(text, filled(low_rank.create(unet, TRANSFORMER, rank=2, seed=i), i), scale=0.5)
        for i, text in enumerate(("cat", "nude"))
    ]
    first, second = (spm.permeability(pipeline, "the cat", m.target) for m in membranes)
    assert first == 1.0 > second
    path = next(path for path in membranes[0].adapter if path.endswith("proj_in.kernel"))
    (a_down, a_up), (b_down, b_up) = (m.adapter[path] for m in membranes)
    expected = {
        "paper": 0.5 * (first * a_down @ a_up + second * b_down @ b_up),
        "code": 0.5 * (first * a_down + second * b_down) @ (first * a_up + second * b_up),
    }
    for scaling, change in expected.items():
        scaled = spm.transported(pipeline, membranes, "the cat", scaling=scaling)
        np.testing.assert_allclose(FLAT(scaled.params["unet"])[path], FLAT(unet)[path] + change, rtol=1e-5, atol=1e-6)


def test_refusals(pipeline):
    unet = pipeline.params["unet"]
    with pytest.raises(ValueError, match=r"rank 99 does not fit down_blocks.*expected 1\.\.32"):
        low_rank.create(unet, TRANSFORMER, rank=99, seed=0)
    with pytest.raises(ValueError, match="no layer of this UNet matches"):
        low_rank.create({"conv_in": unet["conv_in"]}, TRANSFORMER, rank=1, seed=0)
    with pytest.raises(ValueError, match="neither linear nor a 1x1 convolution"):
        low_rank.create(unet, re.compile("conv_out.kernel"), rank=1, seed=0)
    with pytest.raises(ValueError, match="scaling must be"):
        spm.transported(pipeline, [], "a", scaling="half")
    for align in (spm.align, modular_lora.align):
        with pytest.raises(ValueError, match="blank"):
            align(pipeline, Concept("blank", ("",)))


def test_deltas_add_up():
    one, two = ({"a": {"kernel": np.full(2, value)}} for value in (1.0, 2.0))
    other = {"b": {"kernel": np.ones(3)}}
    total = FLAT(low_rank.together(one, None, two, other))
    np.testing.assert_array_equal(total["a.kernel"], [3, 3])
    np.testing.assert_array_equal(total["b.kernel"], [1, 1, 1])
    assert add(one, None) is one
