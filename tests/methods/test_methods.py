"""Alignment methods against float64 solutions of their stated objectives and a PyTorch reference of ESD's loss."""

import jax
import numpy as np
import pytest

import convert
from spqr_jax import backbones
from spqr_jax import params as params_lib
from spqr_jax.backbones import Condition
from spqr_jax.backbones.stable_diffusion import STABLE_DIFFUSION
from spqr_jax.methods import METHODS, Concept, esd, rece, uce
from spqr_jax.methods.tools import closed_form, loop, negative_guidance
from spqr_jax.methods.tools.closed_form import Edit
from spqr_jax.sampling import partial

torch = pytest.importorskip("torch")
CONCEPT = Concept("cat", ("cat", "nude"), preserve=("dog",))
FLAT = params_lib.flatten


@pytest.fixture(scope="module")
def pipeline(reference):
    return convert.load(reference("sd1")[1])


def changed(before, after) -> set[str]:
    flat = FLAT(after.params["unet"])
    return {path for path, leaf in FLAT(before.params["unet"]).items() if not np.array_equal(leaf, flat[path])}


def test_one_pair_is_a_rank_one_update():
    """Closed form with a single pair: W* = W + a (v - W c) c^T / (ridge + a |c|^2), written for kernel = W^T."""
    rng = np.random.default_rng(0)
    kernel, c, v, a, ridge = rng.standard_normal((8, 5)), rng.standard_normal(8), rng.standard_normal(5), 0.7, 0.3
    solved = closed_form.solve(kernel, [Edit(c[None], c[None], np.array([a]))], [v[None]], ridge)
    expected = kernel + a * np.outer(c, v - c @ kernel) / (ridge + a * c @ c)
    np.testing.assert_allclose(solved, expected, rtol=1e-12, atol=1e-12)


def test_solution_minimises_the_objective():
    """The gradient of the stated least-squares objective vanishes at the solution (float64)."""
    rng = np.random.default_rng(1)
    kernel = rng.standard_normal((8, 5))
    edits = [Edit(rng.standard_normal((m, 8)), rng.standard_normal((m, 8)), rng.uniform(0.1, 1, m)) for m in (3, 12)]
    values = [rng.standard_normal((len(e.inputs), 5)) for e in edits]
    solved = closed_form.solve(kernel, edits, values, 0.5)
    gradient = 0.5 * (solved - kernel)
    for edit, value in zip(edits, values, strict=True):
        gradient += (edit.inputs * edit.weights[:, None]).T @ (edit.inputs @ solved - value)
    assert np.abs(gradient).max() < 1e-10


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_uce_equals_the_sum_over_pairs(pipeline, variant):
    """Every matrix against the papers' formula, summed pair by pair in float64 with PyTorch's [out, in] weights."""
    edited = uce.align(pipeline, CONCEPT, variant=variant)
    states = closed_form.text_states(pipeline, ["cat", "nude", " " if variant == "v1" else "", "dog", ""])
    pairs = []
    for state, text in zip(states[:2], CONCEPT.erase, strict=True):
        i = STABLE_DIFFUSION.last_words(pipeline, text)[0]
        rows = range(77 - i) if variant == "v1" else range(1)
        pairs += [(state[i + r], states[2][r], 1.0) for r in rows]
    if variant == "v1":
        pairs += [(c, c, 0.5) for state in states[3:] for c in state]  # two preserved texts: max(0.1, 1/2)
    else:
        dog = states[3][STABLE_DIFFUSION.last_words(pipeline, "dog")[0]]
        pairs.append((dog, dog, 1.0))
    for path, kernel in closed_form.key_value_matrices(pipeline, "test").items():
        weight = kernel.T
        left, right = 0.5 * weight, 0.5 * np.eye(weight.shape[1])
        for c, source, a in pairs:
            left = left + a * np.outer(weight @ source, c)
            right = right + a * np.outer(c, c)
        expected = (left @ np.linalg.inv(right)).T
        np.testing.assert_allclose(FLAT(edited.params["unet"])[path], expected, rtol=1e-4, atol=1e-5)


def test_closed_forms_change_keys_and_values_only(pipeline):
    expected = set(closed_form.key_value_matrices(pipeline, "test"))
    for method in (uce, rece):
        aligned = method.align(pipeline, CONCEPT)
        assert changed(pipeline, aligned) == expected
        assert aligned.params["text_encoder"] is pipeline.params["text_encoder"]


def test_uce_moves_the_concept_to_the_target_and_keeps_the_preserved(pipeline):
    edited = uce.align(pipeline, CONCEPT, variant="v2", ridge=1e-3)
    states = closed_form.text_states(pipeline, ["cat", "", "dog"])
    cat, dog = (states[i][STABLE_DIFFUSION.last_words(pipeline, text)[0]] for i, text in ((0, "cat"), (2, "dog")))
    for path, kernel in closed_form.key_value_matrices(pipeline, "test").items():
        new = np.asarray(FLAT(edited.params["unet"])[path], np.float64)
        assert np.abs(cat @ new - states[1][0] @ kernel).max() < 0.05 * np.abs(cat @ kernel).max() + 1e-3
        assert np.abs(dog @ new - dog @ kernel).max() < 0.05 * np.abs(dog @ kernel).max()


def test_rece_embedding_revives_the_original_response(pipeline):
    """c' minimises sum |x K - c K0|^2 + ridge |x|^2: compared with a stacked least-squares solution."""
    original = closed_form.key_value_matrices(pipeline, "test")
    edited = closed_form.key_value_matrices(uce.align(pipeline, CONCEPT), "test")
    c = closed_form.text_states(pipeline, ["cat"])
    ours = rece.reviving_embeddings(c, original, edited, 0.1)[0]
    d = c.shape[-1]
    stacked = np.concatenate([*(k.T for k in edited.values()), np.sqrt(0.1) * np.eye(d)])
    wanted = np.concatenate([*((c[0] @ original[p]).T for p in edited), np.zeros((d, c.shape[1]))])
    expected = np.linalg.lstsq(stacked, wanted, rcond=None)[0].T
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-8)


def test_rece_is_its_rounds_from_uce(pipeline):
    """Two rounds written out in float64 with PyTorch's [out, in] weights: c' from the last W, then c' -> the target."""
    aligned = FLAT(rece.align(pipeline, CONCEPT, epochs=2).params["unet"])
    kernels = closed_form.key_value_matrices(pipeline, "test")
    first = {path: kernel.T for path, kernel in kernels.items()}
    started = closed_form.key_value_matrices(uce.align(pipeline, CONCEPT), "test")
    now = {path: kernel.T for path, kernel in started.items()}
    cat, nude, target, dog = closed_form.text_states(pipeline, ["cat", "nude", CONCEPT.target, "dog"])
    d = cat.shape[-1]
    for _ in range(2):
        inverse = np.linalg.inv(0.1 * np.eye(d) + sum(w.T @ w for w in now.values()))
        revive = inverse @ sum(now[path].T @ first[path] for path in now)
        pairs = [(revive @ c, v, 1.0) for state in (cat, nude) for c, v in zip(state, target, strict=True)]
        pairs += [(c, c, 0.1) for state in (target, dog) for c in state]
        right = np.linalg.inv(0.1 * np.eye(d) + sum(a * np.outer(c, c) for c, _, a in pairs))
        now = {p: (0.1 * w + sum(a * np.outer(w @ v, c) for c, v, a in pairs)) @ right for p, w in now.items()}
    for path, weight in now.items():
        np.testing.assert_allclose(aligned[path], weight.T, rtol=1e-4, atol=1e-5)


def test_expanded_concepts_erase_texts_within_templates_too(pipeline):
    concept = CONCEPT._replace(templates=("a {}", "a {} eat"))
    by_hand = concept._replace(erase=("cat", "nude", "a cat", "a nude", "a cat eat", "a nude eat"))
    for method in (uce, rece):
        expanded, written = (
            FLAT(method.align(pipeline, c, expand=e).params["unet"]) for c, e in ((concept, True), (by_hand, False))
        )
        plain = FLAT(method.align(pipeline, concept).params["unet"])
        for path, leaf in expanded.items():
            np.testing.assert_array_equal(leaf, written[path])
        assert any((leaf != plain[path]).any() for path, leaf in expanded.items())


def test_texts_that_the_encoder_cuts_off_are_refused(pipeline):
    long = " ".join(["cat"] * 80)
    for field, bad in (("erase", CONCEPT._replace(erase=(long,))), ("preserve", CONCEPT._replace(preserve=(long,)))):
        for method in (uce, rece):
            with pytest.raises(ValueError, match=rf"in `{field}` takes .* tokens, the text encoder reads 77"):
                method.align(pipeline, bad)


def test_esd_trains_at_the_timestep_that_its_latents_stand_at(pipeline, monkeypatch):
    """After n of 10 steps of the student's own sample the latents stand 9 - n from the clean end, t within that."""
    drawn = []
    monkeypatch.setattr(partial, "partial_sample", lambda _, unet, *rest: drawn.append((unet, rest[3])))

    def fit(name, gradient, static, adam, params, inputs, steps, frozen=(), **_):
        student = jax.tree.map(lambda leaf: leaf + 1, params)
        for i in range(steps):
            _, t, *_ = inputs(i, student, *frozen)
            unet, done = drawn[-1]
            assert (t // 100 == 9 - done).all() and t.shape == (3,)
            path = "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_k.kernel"
            np.testing.assert_array_equal(FLAT(unet)[path], FLAT(student)[path])
        return params

    monkeypatch.setattr(loop, "fit", fit)
    esd.align(pipeline, CONCEPT, method="esd-x", steps=40, batch_size=3, sampling_steps=10)
    assert {done for _, done in drawn} == set(range(10))


def test_esd_u_trains_everything_but_three_parts(pipeline):
    """CompVis' `noxattn`: not attn2, not the time embedding, not `out.*`, which are conv_norm_out and conv_out."""
    mask = FLAT(esd.trained(STABLE_DIFFUSION, pipeline.params["unet"], "esd-u"))
    parts = {path.split(".")[0] for path, flag in mask.items() if not flag and ".attn2." not in path}
    assert parts == {"time_embedding", "conv_norm_out", "conv_out"}
    assert not any(flag for path, flag in mask.items() if ".attn2." in path or path.split(".")[0] in parts)


def test_esd_loss_and_gradient_equal_pytorch(pipeline, reference):
    unet = reference("sd1")[0].unet
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((2, 8, 8, 4)).astype(np.float32)
    context, empty = (rng.standard_normal((2, 77, 32)).astype(np.float32) for _ in range(2))
    t = np.array([10, 700], np.int32)

    bind, told = backbones.denoiser(pipeline).bind, (Condition(context), Condition(empty))

    def loss(params):
        return negative_guidance.erasing_loss(bind(params), bind(pipeline.params["unet"]), latents, t, *told, 1.5)

    with jax.default_matmul_precision("highest"):
        value, gradient = jax.jit(jax.value_and_grad(loss))(pipeline.params["unet"])
    x, c, e = (torch.tensor(a) for a in (latents.transpose(0, 3, 1, 2), context, empty))
    with torch.no_grad():
        with_text, without = unet(x, torch.tensor(t), c).sample, unet(x, torch.tensor(t), e).sample
    unet.zero_grad()
    theirs = torch.nn.functional.mse_loss(unet(x, torch.tensor(t), c).sample, without - 1.5 * (with_text - without))
    theirs.backward()
    assert float(value) == pytest.approx(float(theirs), rel=1e-4)
    ours = FLAT(gradient)["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.kernel"]
    reference_gradient = unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight.grad.numpy().T
    assert np.abs(ours - reference_gradient).max() <= 1e-4 * np.abs(reference_gradient).max()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["esd-x", "esd-u"])
def test_esd_trains_exactly_its_parameters(pipeline, method):
    aligned = esd.align(pipeline, CONCEPT, method=method, steps=2, sampling_steps=4, batch_size=2, lr=1e-3)
    mask = FLAT(esd.trained(STABLE_DIFFUSION, pipeline.params["unet"], method))
    assert changed(pipeline, aligned) == {path for path, flag in mask.items() if flag}
    has_cross = {path for path in mask if ".attn2." in path}
    assert (set(path for path, flag in mask.items() if flag) == has_cross) == (method == "esd-x")
    assert not any(mask[path] for path in mask if path.startswith(("time_embedding", "conv_out"))) or method == "esd-x"


@pytest.mark.parametrize("name", ["none", "uce", "rece", pytest.param("esd", marks=pytest.mark.slow), "sld"])
def test_the_same_seed_gives_the_same_weights(pipeline, name):
    """Methods with files of their own are tested there."""
    options = {"steps": 1, "sampling_steps": 4, "batch_size": 2, "lr": 1e-3} if name == "esd" else {}
    first, second = (METHODS[name].align(pipeline, CONCEPT, seed=3, **options) for _ in range(2))
    assert not changed(first, second)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("none", "eraseanything")])
def test_every_method_refuses_an_empty_concept_before_any_work(pipeline, name):
    for bad in (Concept("nothing", ()), Concept("blank", ("",))):
        with pytest.raises(ValueError, match=bad.name):
            METHODS[name].align(pipeline, bad)


@pytest.mark.slow
def test_uce_in_full_size_takes_less_than_a_minute():
    """SD1.5's text encoder and cross-attention, random weights, compilation included."""
    import time

    from benchmarks import methods
    from spqr_jax.concepts import NUDITY

    full = methods.sd15()
    start = time.perf_counter()
    edited = uce.align(full, NUDITY)
    assert time.perf_counter() - start < 60
    assert len(changed(full, edited)) == 32
