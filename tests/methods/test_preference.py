"""SafetyDPO's preference and ResAlign's hypergradient, against PyTorch and linear algebra."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
import pytest

import convert
from spqr_jax import backbones
from spqr_jax import generate as generate_lib
from spqr_jax import params as params_lib
from spqr_jax.backbones import Condition
from spqr_jax.backbones.stable_diffusion import STABLE_DIFFUSION
from spqr_jax.methods import Concept, resalign, safety_dpo
from spqr_jax.methods.tools import loop
from spqr_jax.methods.tools import pictures as pictures_lib

torch = pytest.importorskip("torch")
from tests import stand_in

CAT = Concept("cat", ("cat",), prompts=("a cat", "cat nude"), replacements=("a dog",), retain=("dog", "do"))
RNG = np.random.default_rng(0)
LORA = STABLE_DIFFUSION.regions.lora


@pytest.fixture(scope="module")
def real(reference):
    return convert.load(reference("sd1")[1])


@pytest.fixture(scope="module")
def pipeline(real):
    return stand_in.pipeline(real)


def pictures(batch: int = 2) -> dict[str, np.ndarray]:
    mean = RNG.standard_normal((batch, 8, 8, 4)).astype(np.float32)
    return {"mean": mean, "std": 0.1 * np.abs(mean)}


def split(params):
    """(trained, frozen): attention kernels in an adapter's place, so that the reference differs from the model."""
    mask = params_lib.map_with_path(lambda path, _: bool(LORA.search(path)), params)
    return params_lib.partition(params, mask)


class Frozen(stand_in.UNet):
    """A reference of its own: it reads the frozen leaves alone."""


def test_preference_loss_and_gradient_equal_pytorch(pipeline):
    """-log sigmoid(-beta / 2 ((m_w - m_l) - (r_w - r_l))) with per-sample means, shared noise and timestep."""
    train, rest = split(pipeline.params["unet"])
    context = np.asarray(backbones.condition(pipeline, ["cat", ""]).context)
    batch = {"safe": pictures(), "unsafe": pictures(), "condition": Condition(context)}
    static = safety_dpo.Static(stand_in.denoiser(stand_in.UNet()), stand_in.denoiser(Frozen()), 300.0)
    inputs, key = (train, rest, backbones.schedule(pipeline), batch), jax.random.key(4)
    loss, grads = stand_in.jitted(loop.descent(safety_dpo.preference_loss), static, *inputs, key)

    leaves = stand_in.tensors(pipeline.params["unet"])
    frozen = {path: leaves[path].detach() for path in sorted(stand_in.flat(rest))}
    model, reference = stand_in.torch_unet(leaves), stand_in.torch_unet(frozen)
    keys = jax.random.split(key, 2)
    safe, noise, t = stand_in.drawn(keys[0], batch["safe"])
    drawn = np.asarray(jax.random.normal(keys[1], noise.shape))
    unsafe = stand_in.noised(torch.tensor(batch["unsafe"]["mean"] + batch["unsafe"]["std"] * drawn), noise, t.long())

    def errors(unet, noisy):
        return ((unet(noisy, t, torch.tensor(context)) - noise) ** 2).mean(dim=(1, 2, 3))

    difference = errors(model, safe) - errors(model, unsafe) - (errors(reference, safe) - errors(reference, unsafe))
    theirs = -torch.nn.functional.logsigmoid(-150.0 * difference).mean()
    expected = stand_in.gradients(theirs, leaves)
    assert float(loss) == pytest.approx(theirs.item(), rel=1e-4)
    stand_in.assert_close(grads, {path: expected[path] for path in stand_in.flat(train)})


def test_pairs_share_their_noise_and_each_unsafe_prompt_has_its_replacement(real, monkeypatch):
    asked = []

    def generate(_, prompts, seeds, **options):
        asked.append((prompts, seeds, options))
        return np.zeros((len(prompts), 16, 16, 3), np.uint8)

    monkeypatch.setattr(generate_lib, "generate", generate)
    monkeypatch.setattr(loop, "fit", lambda name, gradient, static, adam, params, *_, **__: params)
    concept = CAT._replace(replacements=("a dog", "do"))
    safety_dpo.align(real, concept, seed=3, images=5, batch_size=2, sampling_steps=2)
    (unsafe, *how), (safe, *likewise) = asked
    assert how == likewise and set(unsafe) == set(CAT.prompts)
    partner = dict(zip(CAT.prompts, concept.replacements, strict=True))
    assert safe == [partner[prompt] for prompt in unsafe]


def test_pairs_carry_the_unsafe_caption(pipeline):
    """A share of captions is empty."""
    unsafe = pictures_lib.make(pipeline, CAT.prompts, 4, seed=3, steps=2)
    safe = pictures_lib.make(pipeline, CAT.prompts, 4, seed=3, steps=2)
    texts = jax.tree.map(np.asarray, backbones.condition(pipeline, [*CAT.prompts, ""]))
    rows = np.arange(4)
    for share, expected in ((0.0, unsafe.prompt), (1.0, np.full(4, 2))):
        batch = safety_dpo.pair_batch(safe, unsafe, texts, rows, share, np.random.default_rng(0))
        np.testing.assert_array_equal(batch["condition"].context, texts.context[expected])


def test_adapters_stand_on_attention_and_start_as_published(real):
    """Names, rank and spread; SafetyDPO starts at the base model, ResAlign beside it, for gradients in both."""
    base = stand_in.flat(real.params["unet"])
    layers = {path.removesuffix(".kernel") for path in base if LORA.search(path)}
    _, adapters, rest = safety_dpo.adapted(real, 4, seed=0)
    flat = stand_in.flat(adapters)
    assert set(flat) == {f"{layer}.lora.lora_{side}.kernel" for layer in layers for side in "AB"}
    assert all(not leaf.any() for path, leaf in flat.items() if "lora_B" in path)
    assert np.std(np.concatenate([x.reshape(-1) for p, x in flat.items() if "lora_A" in p])) == pytest.approx(
        0.25, 0.05
    )
    assert not stand_in.changed(real.params["unet"], rest)
    _, adapters, _ = resalign.adapted(real, 4, seed=0)
    for side, spread in (("lora_A", 0.008), ("lora_B", 0.002)):
        values = np.concatenate([np.asarray(x).reshape(-1) for p, x in stand_in.flat(adapters).items() if side in p])
        assert np.std(values) == pytest.approx(spread, rel=0.1)


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_hypergradient_is_the_neumann_series(gamma):
    """For a quadratic loss with Hessian H: gamma sum_{k<K} (I - gamma (H + I))^k wanted, in float64."""
    half = RNG.standard_normal((5, 5))
    hessian = 0.02 * half @ half.T
    wanted, start = RNG.standard_normal(5), RNG.standard_normal(5)

    def loss(params):
        return 0.5 * params["w"] @ (np.float32(hessian) @ params["w"])

    tree, goal = {"w": start.astype(np.float32)}, {"w": wanted.astype(np.float32)}
    ours, ratio = resalign.hypergradient(loss, tree, goal, gamma, 5)
    step = np.eye(5) - gamma * (hessian + np.eye(5))
    terms = [np.linalg.matrix_power(step, k) @ wanted for k in range(5)]
    np.testing.assert_allclose(ours["w"], gamma * np.sum(terms, axis=0), rtol=1e-4, atol=1e-6)
    sums = np.cumsum(terms, axis=0)
    ratios = [np.linalg.norm(step @ v) / np.linalg.norm(v) for v in sums[:-1]]
    assert float(ratio) == pytest.approx(np.mean(ratios), rel=1e-4)
    if gamma == 1.0:  # what the series tends to
        exact = np.linalg.solve(np.eye(5) + hessian, wanted)
        many, _ = resalign.hypergradient(loss, tree, goal, gamma, 40)
        np.testing.assert_allclose(many["w"], exact, rtol=1e-3, atol=1e-4)


def test_direct_loss_equals_pytorch(pipeline):
    """(1 - lambda) times the negated denoising loss, and beta times the distance from the base on retained pictures."""
    train, rest = split(pipeline.params["unet"])
    static = resalign.Static(stand_in.denoiser(stand_in.UNet()), stand_in.denoiser(Frozen()))
    context = np.asarray(backbones.condition(pipeline, ["cat", "dog"]).context)
    harmful, retain = ({**pictures(), "condition": Condition(context)} for _ in range(2))
    keys, alphas = jax.random.split(jax.random.key(1)), backbones.schedule(pipeline)
    weights = np.float32([0.2, 1.6])
    inputs = (train, rest, alphas, (harmful, keys[0]), (retain, keys[1]), weights)
    value, grads = stand_in.jitted(loop.descent(resalign.direct_loss), static, *inputs)
    leaves = stand_in.tensors(pipeline.params["unet"])
    frozen = {path: leaves[path].detach() for path in sorted(stand_in.flat(rest))}
    model, base = stand_in.torch_unet(leaves), stand_in.torch_unet(frozen)
    noisy, noise, t = stand_in.drawn(keys[0], harmful)
    mse = torch.nn.functional.mse_loss
    theirs = -0.2 * mse(model(noisy, t, torch.tensor(context)), noise)
    noisy, noise, t = stand_in.drawn(keys[1], retain)
    theirs = theirs + 1.6 * mse(model(noisy, t, torch.tensor(context)), base(noisy, t, torch.tensor(context)))
    expected = stand_in.gradients(theirs, leaves)
    assert float(value) == pytest.approx(theirs.item(), rel=1e-4)
    stand_in.assert_close(grads, {path: expected[path] for path in stand_in.flat(train)})


class Given(NamedTuple):
    """In the place of ResAlign's `Batches`."""

    schedule: jax.Array
    batches: Iterator

    def take(self, which, number):
        assert which == "benign"
        return next(self.batches)


def test_simulated_fine_tuning_equals_pytorch(pipeline):
    """Gradient descent and Adam on the trained leaves, two steps each."""
    train, rest = split(pipeline.params["unet"])
    static = resalign.Static(*[stand_in.denoiser(stand_in.UNet())] * 2)
    context = np.asarray(backbones.condition(pipeline, ["cat", "dog"]).context)
    batches = [({**pictures(), "condition": Condition(context)}, jax.random.key(i)) for i in range(2)]
    for name in ("gd", "adam"):
        draw = Given(backbones.schedule(pipeline), iter(batches))
        params = resalign.simulate(static, train, rest, resalign.Tuning(2, 0.01, name), draw)
        assert next(draw.batches, None) is None
        leaves = stand_in.tensors(pipeline.params["unet"])
        chosen = [leaves[path] for path in stand_in.flat(train)]
        optimiser = torch.optim.SGD(chosen, lr=0.01) if name == "gd" else torch.optim.Adam(chosen, lr=0.01)
        for batch, key in batches:
            noisy, noise, t = stand_in.drawn(key, batch)
            optimiser.zero_grad()
            output = stand_in.torch_unet(leaves)(noisy, t, torch.tensor(context))
            torch.nn.functional.mse_loss(output, noise).backward()
            optimiser.step()
        for path, leaf in stand_in.flat(params).items():
            moved = leaves[path].detach().numpy() - stand_in.flat(train)[path]
            assert np.abs(np.asarray(leaf) - stand_in.flat(train)[path] - moved).max() <= 1e-3 * np.abs(moved).max()


def test_low_rank_is_the_best_of_its_rank():
    delta = RNG.standard_normal((8, 6))
    down, up = resalign.low_rank(delta, 2)
    s = np.linalg.svd(delta, compute_uv=False)
    assert np.linalg.norm(delta - down @ up) == pytest.approx(np.linalg.norm(s[2:]))
    np.testing.assert_allclose(np.linalg.norm(down, axis=0), np.linalg.norm(up, axis=1))


def test_tunings_and_ramp():
    assert {(t.steps, t.lr) for t in resalign.TUNINGS[:-1]} == {
        (steps, lr) for steps in (5, 10, 20, 30) for lr in (1e-4, 1e-5, 1e-6)
    }
    assert {t.optimiser for t in resalign.TUNINGS} == {"gd", "adam", "whole"}
    ramp = [resalign.ramp(1.6, 2.0, x) for x in (0.0, 0.49, 0.75, 1.0)]
    assert ramp[:2] == [1.6, 1.6] and ramp[2] == pytest.approx(1.8) and ramp[3] == pytest.approx(2.0, abs=1e-2)


def test_bad_input(real):
    with pytest.raises(ValueError, match="images=1, expected at least 16"):
        safety_dpo.align(real, CAT, images=1)
    with pytest.raises(ValueError, match="images=1, expected at least 4"):
        resalign.align(real, CAT, images=1)
    with pytest.raises(ValueError, match="`retain` is empty"):
        resalign.align(real, Concept("cat", ("cat",)))
    with pytest.raises(ValueError, match="tunings=1, expected at least 3"):
        resalign.align(real, CAT, tunings=resalign.TUNINGS[:1])


@pytest.mark.slow
def test_both_on_the_real_unet(real):
    """Adapters trained through the real attention and merged: attention kernels change, nothing else does."""
    expected = {path for path in stand_in.flat(real.params["unet"]) if LORA.search(path)}
    options = {"images": 2, "batch_size": 2, "sampling_steps": 2, "steps": 2, "lr": 1e-2}
    aligned = safety_dpo.align(real, CAT, warmup=0, **options)
    assert stand_in.changed(real.params["unet"], aligned.params["unet"]) == expected
    tunings = (resalign.Tuning(1, 1e-4, "gd"), resalign.Tuning(1, 1e-4, "adam"), resalign.Tuning(1, 1e-6, "whole"))
    aligned = resalign.align(real, CAT, retain_batch_size=2, tunings=tunings, neumann=2, **options)
    assert stand_in.changed(real.params["unet"], aligned.params["unet"]) == expected
