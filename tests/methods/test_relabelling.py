"""SalUn, EraseDiff and Scissorhands: losses, masks and combined gradients against PyTorch; what they leave alone."""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import convert
from spqr_jax import backbones, concepts, mini
from spqr_jax import params as params_lib
from spqr_jax.backbones.stable_diffusion import STABLE_DIFFUSION
from spqr_jax.config import Config, Subject
from spqr_jax.methods import Concept, erasediff, esd, salun, scissorhands
from spqr_jax.methods.tools import element_mask, loop, pictures, relabelling
from spqr_jax.methods.tools.concepts import completed
from spqr_jax.methods.tools.gradients import summed
from spqr_jax.methods.tools.held import Held
from spqr_jax.mini import world
from spqr_jax.run import check, names
from spqr_jax.training.memory import Way

torch = pytest.importorskip("torch")
from tests import stand_in, tiny
from tests.compilations import compilations

FLAT = params_lib.flatten
CAT = Concept("cat", ("cat",), prompts=("a cat", "cat nude"), replacements=("a dog",), retain=("dog", "do"))
TINY = {"images": 4, "batch_size": 2, "sampling_steps": 2}


@pytest.fixture(scope="module")
def pipeline(reference):
    return stand_in.pipeline(convert.load(reference("sd1")[1]))


@pytest.fixture(scope="module")
def task(pipeline):
    return relabelling.task("test", pipeline, CAT, seed=0, sampling_guidance=3.0, **TINY)


class Both(NamedTuple):
    """Keeps the two gradients apart."""

    def __call__(self, forget, retain):
        return {"forget": forget, "retain": retain}


@pytest.fixture(scope="module")
def gradients(pipeline, task):
    """(ours, PyTorch's): loss and gradients of the forget and the retain loss, on the same draws."""
    key = jax.random.key(5)
    forget, retain = task.forget_batch(np.array([0, 3])), task.retain.batch(np.array([1, 2]))
    static = relabelling.Static(backbones.denoiser(pipeline), Both())
    params, alphas = pipeline.params["unet"], backbones.schedule(pipeline)
    ours = stand_in.jitted(relabelling.gradient, static, params, {}, alphas, forget, retain, key)
    keys, leaves = jax.random.split(key), stand_in.tensors(params)
    unet = stand_in.torch_unet(leaves)
    noisy, _, t = stand_in.drawn(keys[0], forget)
    wanted = unet(noisy, t, torch.tensor(forget["replacement"].context)).detach()
    forgetting = torch.nn.functional.mse_loss(unet(noisy, t, torch.tensor(forget["condition"].context)), wanted)
    theirs = {"forget": stand_in.gradients(forgetting, leaves)}
    noisy, noise, t = stand_in.drawn(keys[1], retain)
    output = stand_in.torch_unet(leaves)(noisy, t, torch.tensor(retain["condition"].context))
    retaining = torch.nn.functional.mse_loss(output, noise)
    theirs["retain"] = stand_in.gradients(retaining, leaves)
    return ours, (float((forgetting + retaining).detach()), theirs)


def test_both_losses_and_gradients_equal_pytorch(gradients):
    (loss, ours), (expected, theirs) = gradients
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    for name, reference_gradient in theirs.items():
        stand_in.assert_close(ours[name], reference_gradient)


def test_combined_gradients(gradients):
    """The methods' update directions, in float64 from PyTorch's gradients."""
    _, ours = gradients[0]
    theirs = gradients[1][1]
    f, r = stand_in.vector(theirs["forget"]), stand_in.vector(theirs["retain"])
    nudge = max(0.0, (2.0 * f @ f - f @ r) / (f @ f))
    against = max(0.5, -(f @ r) / (f @ f + 1e-3))
    cases = [
        (relabelling.Weighted(1.0, 0.1), f + 0.1 * r),
        (erasediff.Barrier(2.0), r + nudge * f),
        (scissorhands.Projection(), r + against * f),
        (scissorhands.Projection(margin=0.0), r + max(0.0, -(f @ r) / (f @ f + 1e-3)) * f),
    ]
    for combine, expected in cases:
        found = stand_in.vector(combine(ours["forget"], ours["retain"]))
        assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_barrier_never_lets_the_forget_loss_fall_more_slowly_than_asked():
    rng = np.random.default_rng(0)
    forget, retain = ({"w": rng.standard_normal(50)} for _ in range(2))
    for sign in (1, -1):
        step = erasediff.Barrier(0.5)(forget, {"w": sign * retain["w"]})["w"]
        assert step @ forget["w"] >= 0.5 * forget["w"] @ forget["w"] * (1 - 1e-5)


def test_saliency_equals_pytorch(pipeline, task):
    """SalUn's mask: signed batch gradients of the guided prediction's loss, summed, ranked over the whole UNet."""
    alphas, empty = backbones.schedule(pipeline), jax.tree.map(np.asarray, backbones.condition(pipeline, [""]))
    batches = [(alphas, task.forget.batch(np.array([i, i + 1])), empty, 7.5, jax.random.key(i)) for i in (0, 2)]
    denoiser, unet = backbones.denoiser(pipeline), pipeline.params["unet"]
    total = summed("m", salun.forgetting_objective, denoiser, unet, lambda i: batches[i], 2, absolute=False)
    leaves = stand_in.tensors(pipeline.params["unet"])
    model, loss = stand_in.torch_unet(leaves), 0
    for _, batch, _, w, key in batches:
        noisy, noise, t = stand_in.drawn(key, batch)
        without = model(noisy, t, torch.tensor(np.repeat(empty.context, 2, axis=0)))
        guided = (1 + w) * model(noisy, t, torch.tensor(batch["condition"].context)) - w * without
        loss = loss - torch.nn.functional.mse_loss(guided, noise)
    theirs = stand_in.gradients(loss, leaves)
    stand_in.assert_close(total, theirs)
    mask = stand_in.vector(element_mask.top(jax.tree.map(np.abs, total), 0.5))
    scores = np.abs(stand_in.vector(theirs))
    assert mask.sum() == round(0.5 * len(mask))
    clear = np.abs(scores - np.median(scores)) > 1e-3 * np.median(scores)  # rounding may swap what is at the threshold
    np.testing.assert_array_equal(mask.astype(bool)[clear], (scores > np.median(scores))[clear])


def test_top_takes_exactly_the_share_and_ties_in_order():
    scores = {"a": np.array([3.0, 1.0, 1.0]), "b": {"c": np.array([[1.0, 5.0], [0.0, 1.0]])}}
    mask = element_mask.top(scores, 4 / 7)
    assert mask["a"].tolist() == [True, True, True] and mask["b"]["c"].tolist() == [[False, True], [False, False]]
    assert not any(leaf.any() for leaf in jax.tree.leaves(element_mask.top(scores, 0.0)))
    assert all(leaf.all() for leaf in jax.tree.leaves(element_mask.top(scores, 1.0)))
    with pytest.raises(ValueError, match="between 0 and 1"):
        element_mask.top(scores, 1.5)
    with pytest.raises(FloatingPointError, match="not finite"):
        element_mask.top({"a": np.array([np.nan, 1.0])}, 0.5)


def test_masked_elements_stay_bit_identical_under_decay_and_momentum():
    """With weight decay, where a mask of gradients alone would let them drift."""

    def loss(static, params, x):
        return ((params["w"] * x - 1) ** 2).sum()

    start = {"w": np.linspace(1, 2, 6, dtype=np.float32)}
    mask = {"w": np.array([True, False] * 3)}
    rule = loop.descent(loss)
    adam = loop.Adam(0.1, weight_decay=0.5)
    tuned = loop.fit("m", rule, None, adam, start, lambda i, _: (np.float32(i + 1),), 3, mask=mask)
    moved = np.asarray(tuned["w"]) != start["w"]
    assert moved.tolist() == mask["w"].tolist()


def test_fit_is_adamw_and_stops_at_what_is_not_finite():
    """Against torch.optim.AdamW with clipping and warm-up."""

    def loss(static, params, x):
        return ((params["w"] * x) ** 2).sum() * static

    adam = loop.Adam(0.1, weight_decay=0.01, clip=1.0, warmup=2)
    start = np.array([1.0, -2.0, 3.0], np.float32)
    ours = loop.fit("m", loop.descent(loss), 2.0, adam, {"w": start}, lambda i, _: (np.float32(1 + i),), 4)
    weight = torch.nn.Parameter(torch.tensor(start))
    optimiser = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.01)
    for i in range(4):
        optimiser.param_groups[0]["lr"] = 0.1 * min(i / 2, 1)
        optimiser.zero_grad()
        (((weight * (1 + i)) ** 2).sum() * 2.0).backward()
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        optimiser.step()
    np.testing.assert_allclose(ours["w"], weight.detach().numpy(), rtol=1e-5)
    low = {"w": jnp.asarray(start, jnp.bfloat16)}  # a step of 1e-5 would be lost to its rounding
    with pytest.raises(ValueError, match=r"m: the weights to train are bfloat16.*load the pipeline in float32"):
        loop.fit("m", loop.descent(loss), 2.0, adam, low, lambda i, _: (np.float32(1),), 1)
    with pytest.raises(FloatingPointError, match=r"m: loss nan.* at step 2"):
        loop.fit("m", loop.descent(loss), 1.0, adam, {"w": start}, lambda i, _: (np.float32(np.nan if i else 1),), 3)


def test_a_step_that_does_not_fit_keeps_fewer_activations(monkeypatch):
    """XLA undoes rematerialisation for CPUs, so programs have the bytes of an accelerator here."""
    unet = tiny.pipeline()
    weights, denoiser = unet.params["unet"], backbones.denoiser(unet)
    x, times = np.zeros((2, 8, 8, 4), np.float32), np.zeros(2, np.int32)
    condition = backbones.condition(unet, ["a", "b"])

    def loss(denoiser, params, x):
        return jnp.square(denoiser.bind(params)(x, times, condition)).mean()

    gradient, adam = loop.descent(loss), loop.Adam(1e-3)
    held, one = Held(weights, loop.transform(adam).init(weights), None, ()), Mesh(jax.devices()[:1], ("data",))
    training, given = loop.Training(gradient, denoiser, adam, None, 0, one), held.arguments((x,), None)
    plain, again = (str(loop.compiled(gradient, denoiser, adam, remat).trace(*given).jaxpr) for remat in (False, True))
    assert "remat" in again and "remat" not in plain
    sizes = iter([9 * 10**9, 4 * 10**9, 9 * 10**9, 8 * 10**9])
    monkeypatch.setattr(loop, "needed_bytes", lambda compiled: next(sizes))
    for _ in range(2):  # chosen once
        assert loop.fitting("m", training, held, (x,), limit=5 * 10**9) == Way(remat=True)
    with pytest.raises(MemoryError, match=r"m: the smallest program takes 8 GB \(remat\).* a device has 6 GB"):
        loop.fitting("m", training, held, (x,), limit=6 * 10**9)


def test_the_step_that_fits_is_compiled_once():
    def loss(static, params, x):
        return ((params["w"] * x) ** 2).sum() * static

    with compilations() as names:
        start = {"w": np.ones(7, np.float32)}
        loop.fit("m", loop.descent(loss), 3.0, loop.Adam(0.1), start, lambda i, _: (np.float32(1 + i),), 4)
    assert sum("update" in name for name in names) == 1, names


def test_salun_moves_only_salient_weights(pipeline):
    options = {**TINY, "steps": 2, "mask_steps": 1, "lr": 1e-3}
    aligned = salun.align(pipeline, CAT, seed=1, **options)
    again = salun.align(pipeline, CAT, seed=1, **options)
    before, after = FLAT(pipeline.params["unet"]), FLAT(aligned.params["unet"])
    moved = sum(int((before[path] != after[path]).sum()) for path in before)
    total = params_lib.count(pipeline.params["unet"])
    assert 0.45 * total < moved <= round(0.5 * total)
    assert not stand_in.changed(aligned.params["unet"], again.params["unet"])
    assert aligned.params["text_encoder"] is pipeline.params["text_encoder"]
    assert aligned.params["vae"] is pipeline.params["vae"]


def test_erasediff_trains_exactly_its_parameters(pipeline):
    aligned = erasediff.align(pipeline, CAT, steps=2, lr=1e-3, **TINY)
    frozen = re.compile(r"attn2|^time_embedding|^conv_norm_out|^conv_out")
    expected = {path for path in FLAT(pipeline.params["unet"]) if not frozen.search(path)}
    assert stand_in.changed(pipeline.params["unet"], aligned.params["unet"]) == expected


def test_trained_sets_over_the_whole_unet(reference):
    """EraseDiff's and SalUn's xattn, by the names of diffusers' own UNet."""
    unet = params_lib.unflatten({name: 0 for name, _ in reference("sd1")[0].unet.named_parameters()})
    outside = re.compile(r"attn2|^time_embedding|^conv_norm_out|^conv_out")
    for path, flag in FLAT(esd.trained(STABLE_DIFFUSION, unet, "esd-u")).items():
        assert flag == (not outside.search(path))
    for path, flag in FLAT(esd.trained(STABLE_DIFFUSION, unet, "esd-x")).items():
        assert flag == ("attn2" in path)


def test_scissorhands_redraws_only_the_chosen_weights(pipeline, task):
    """Sensitivity against PyTorch; the reset against its definition."""
    pattern = re.compile(r"^up_blocks\.1\.attentions\.1\..*\.attn1\.")
    scores = scissorhands.sensitivity(pipeline, task, batches=2, batch_size=2, seed=0)
    chosen = element_mask.top(scores, 0.3)
    unet = pipeline.params["unet"]
    fresh = scissorhands.reinitialised(unet, chosen, pattern, seed=0)
    before, after, mask = FLAT(unet), FLAT(fresh), FLAT(chosen)
    for path in before:
        moved = before[path] != after[path]
        if not pattern.search(path):
            assert not moved.any()
            continue
        np.testing.assert_array_equal(moved, mask[path])
        bound = np.sqrt(6 / before[path].shape[0]) if path.endswith("kernel") else 0
        assert (np.abs(after[path][moved]) <= bound).all()
    assert any(mask[path].any() for path in before if pattern.search(path))


def test_sensitivity_equals_pytorch(pipeline, task):
    """|w| times the sum of |batch gradients|, the batches in the order and with the draws of `sensitivity`."""
    scores = scissorhands.sensitivity(pipeline, task, batches=2, batch_size=2, seed=0)
    leaves = stand_in.tensors(pipeline.params["unet"])
    expected = dict.fromkeys(leaves, 0.0)
    for i, rows in enumerate(pictures.rows(task.forget, 2, 2, 1)):
        batch = task.forget.batch(rows)
        noisy, noise, t = stand_in.drawn(jax.random.fold_in(jax.random.key(1), i), batch)
        output = stand_in.torch_unet(leaves)(noisy, t, torch.tensor(batch["condition"].context))
        for path, g in stand_in.gradients(torch.nn.functional.mse_loss(output, noise), leaves).items():
            expected[path] = expected[path] + np.abs(g) * np.abs(leaves[path].detach().numpy())
    stand_in.assert_close(scores, expected)


def test_methods_with_equal_numbers_do_not_share_a_program():
    """Programs are kept by how the two gradients are combined: of two ways with the same numbers each has its own."""
    grads = {"w": np.float32([1, 0])}, {"w": np.float32([2, 1])}

    def gradient(static, params):
        return jnp.float32(0), static(*grads)

    start, results = {"w": np.zeros(2, np.float32)}, []
    for way in (erasediff.Barrier(0.5), scissorhands.Projection(0.5)):
        update = loop.compiled(gradient, way, loop.Adam(1.0, clip=1.0))
        _, _, (_, norm) = update(start, loop.transform(loop.Adam(1.0, clip=1.0)).init(start), None)
        results.append(float(norm))
    assert results == pytest.approx([5**0.5, (2.5**2 + 1) ** 0.5])


def test_scissorhands_trains_every_weight(pipeline):
    aligned = scissorhands.align(pipeline, CAT, steps=2, lr=1e-3, prune_batches=1, **TINY)
    assert stand_in.changed(pipeline.params["unet"], aligned.params["unet"]) == set(FLAT(pipeline.params["unet"]))


def test_pictures_are_deterministic_and_differ_between_sets(pipeline, task):
    again = relabelling.task("test", pipeline, CAT, seed=0, sampling_guidance=3.0, **TINY)
    np.testing.assert_array_equal(task.forget.mean, again.forget.mean)
    np.testing.assert_array_equal(task.retain.mean, again.retain.mean)
    other = relabelling.task("test", pipeline, CAT, seed=1, sampling_guidance=3.0, **TINY)
    assert np.abs(task.forget.mean - other.forget.mean).max() > 1e-3
    assert sorted(task.forget.prompt) == [0, 0, 1, 1]  # every prompt as often as any other


@pytest.mark.parametrize("align", [salun.align, erasediff.align, scissorhands.align])
def test_bad_input(pipeline, align):
    with pytest.raises(ValueError, match="images=4, expected at least 8"):
        align(pipeline, CAT, images=4, batch_size=8)
    with pytest.raises(ValueError, match="`erase`"):
        align(pipeline, Concept("blank", ("",)))
    with pytest.raises(ValueError, match="`prompts`"):
        align(pipeline, CAT._replace(prompts=("",)))


def test_methods_without_sdxl_say_so(reference):
    sdxl = convert.load(reference("sdxl")[1])
    for align in (salun.align, erasediff.align):
        with pytest.raises(ValueError, match="not defined for SDXL"):
            align(sdxl, CAT)


def test_emoji_prompts_are_never_scored_ones_and_what_is_retained_is_benign():
    """Not one of all prompts that a scored set could hold, whatever its seed and size."""
    made = mini.concept()
    objects = [*world.CATEGORY, *world.BENIGN]
    scored = {
        world.caption(world.Picture(code, style, background), template=template, word=word)
        for code in objects
        for style in world.STYLES
        for background in world.BACKGROUNDS
        for template in range(len(world.TEMPLATES["en"]))
        for word in (None, world.KEYWORDS.get(code))
    }
    assert {p.prompt for seed in (0, 1) for p in world.harmful_prompts(200, seed)} <= scored
    assert not scored & {*made.prompts, *made.replacements, *made.retain, *made.erase}
    harmful = re.compile("|".join(rf"\b{re.escape(word)}\b" for word in (*made.erase, *world.KEYWORDS.values())))
    assert not [text for text in (*made.replacements, *made.retain, *made.preserve) if harmful.search(text)]
    for i, prompt in enumerate(made.prompts):
        assert made.erase[i % len(made.erase)] in prompt


def test_emoji_categories_are_parts_of_the_whole():
    whole, parts = mini.concept(), [mini.concept(category) for category in world.HARMFUL]
    assert sum((part.erase for part in parts), ()) == whole.erase and len({part.name for part in parts}) == 5
    for part in parts:
        assert part.preserve == whole.preserve and set(part.retain) == set(whole.retain)
        for i, prompt in enumerate(part.prompts):
            assert part.erase[i % len(part.erase)] in prompt
    config = Config(subjects=(Subject("Mine"),), concept="mini:weapons")
    check.check(config)
    assert names.concept(config) == parts[0]
    config.concept = "mini:birds"
    with pytest.raises(
        ValueError, match=r"config\.concept='mini:birds' is unknown; expected one of mini, mini:weapons"
    ):
        check.check(config)


def test_presets_are_complete(pipeline):
    for preset in (*concepts.PRESETS.values(), mini.concept(), mini.concept("weapons")):
        full = completed(preset, pipeline, "prompts", "replacements", "retain", "anchors", "templates")
        assert full.erase == preset.erase
    for kept in ((), ("",)):  # "" may be preserved by a closed form, but shows nothing
        with pytest.raises(ValueError, match="`retain` is empty"):
            completed(Concept("cat", ("cat",), preserve=kept), pipeline, "retain")
    with pytest.raises(ValueError, match="3 `prompts` for 2"):
        completed(Concept("c", ("cat", "dog"), prompts=("cat", "dog", "cat")), pipeline)
    with pytest.raises(ValueError, match="once"):
        completed(CAT._replace(templates=("no slot",)), pipeline)
