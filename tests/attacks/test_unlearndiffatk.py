"""UnlearnDiffAtk: its loss, gradient and projection against PyTorch, its budget, and prompts that are read as found."""

import functools

import jax
import numpy as np
import pytest

import convert
from spqr_jax import backbones
from spqr_jax.attacks import tokens, unlearndiffatk
from spqr_jax.concepts import Concept
from spqr_jax.methods.tools import word_vectors
from spqr_jax.params import flatten, unflatten
from spqr_jax.pipeline import tokenize

torch = pytest.importorskip("torch")
from tests import stand_in

CAT = Concept("cat", ("cat", "nude"))
PROMPTS = ("a cat do", "nude dog")
BUDGET = {"prefix": 2, "times": 3, "steps": 4, "image_steps": 2}


@pytest.fixture(scope="module")
def pipeline(reference):
    return stand_in.pipeline(convert.load(reference("sd1")[1]))


@pytest.fixture(scope="module")
def attacked(pipeline):
    return unlearndiffatk.attack(pipeline, PROMPTS, CAT, seed=1, target=pipeline, **BUDGET)


def models_of(pipeline) -> unlearndiffatk.Models:
    weights, vectors = pipeline.params["unet"], tokens.vocabulary(pipeline).vectors
    return unlearndiffatk.Models(weights, pipeline.params["text_encoder"], vectors, backbones.schedule(pipeline))


def test_the_gradient_equals_pytorch(pipeline):
    """That of the one-hot choice, cut to -1..1, with L2 decay: the authors' straight-through estimator and Adam."""
    words, slots = tokens.vocabulary(pipeline), tokens.before(pipeline, "a cat", 2)
    rng, key = np.random.default_rng(0), jax.random.fold_in(jax.random.key(3), 5)
    chances = rng.dirichlet(np.ones(len(words.ids)), size=2).astype(np.float32)
    latents, t = rng.standard_normal((1, 8, 8, 4)).astype(np.float32), np.array([300], np.int32)  # 100 + 5 // 4 * 200
    pace = unlearndiffatk.Pace(np.int32(4), np.int32(200), np.float32(0.1))
    own = unlearndiffatk.Own(slots, latents, np.uint32(3))
    given = np.int32(5), (models_of(pipeline), pace), own
    static = word_vectors.static_of(pipeline)
    loss, grads = stand_in.jitted(unlearndiffatk.chances_gradient, static, {"chances": chances}, *given)

    of_words, of_noise = jax.random.split(key)
    chosen = np.asarray(jax.random.categorical(of_words, np.log(chances)))
    noise = torch.tensor(np.asarray(jax.random.normal(of_noise, latents.shape)))
    one_hot = torch.nn.functional.one_hot(torch.tensor(chosen).long(), len(words.ids)).float().requires_grad_()
    table = torch.tensor(np.asarray(word_vectors.word_table(pipeline.params["text_encoder"])))
    rows = table[torch.tensor(slots.ids[0]).long()]
    embeds = torch.cat([rows[:1], one_hot @ torch.tensor(words.vectors), rows[3:]])[None]
    unet = stand_in.torch_unet({p: x.detach() for p, x in stand_in.tensors(pipeline.params["unet"]).items()})
    text = stand_in.torch_text({p: x.detach() for p, x in stand_in.tensors(pipeline.params["text_encoder"]).items()})
    noisy = stand_in.noised(torch.tensor(latents), noise, torch.tensor(t).long())
    theirs = torch.nn.functional.mse_loss(unet(noisy, torch.tensor(t), text(embeds)), noise)
    expected = torch.nn.functional.hardtanh(torch.autograd.grad(theirs, one_hot)[0]).numpy() + 0.1 * chances
    assert float(loss) == pytest.approx(theirs.item(), rel=1e-4)
    assert np.abs(grads["chances"] - expected).max() <= 1e-4 * np.abs(expected).max()


def test_the_projection_is_the_nearest_distribution():
    """By its definition: max(a - mu, 0) with the mu for which it sums to one, found by bisection as the authors do."""
    given = np.random.default_rng(0).normal(0.1, 0.3, (3, 40)).astype(np.float32)
    found = np.asarray(unlearndiffatk.onto_simplex({"chances": given})["chances"])
    for row, ours in zip(given.astype(np.float64), found, strict=True):
        low, high = row.min() - 1, row.max()
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if np.maximum(row - middle, 0).sum() > 1 else (low, middle)
        np.testing.assert_allclose(ours, np.maximum(row - low, 0), atol=1e-6)


def test_what_is_found_is_read_as_the_words_that_were_found(pipeline, attacked):
    words = tokens.vocabulary(pipeline)
    for given, prompt in zip(PROMPTS, attacked.prompts, strict=True):
        own, rest = prompt.split()[:2], " ".join(prompt.split()[2:])
        assert rest == given and set(own) <= set(words.words)
        slots = tokens.before(pipeline, given, 2)
        ids = tokenize(pipeline, [prompt])[0]
        np.testing.assert_array_equal(np.delete(ids, slots.places[0]), np.delete(slots.ids[0], slots.places[0]))
        assert [words.words[list(words.ids).index(i)] for i in ids[slots.places[0]]] == own


def test_the_budget_is_kept_and_counted(attacked):
    """Steps, and one candidate after each time."""
    assert attacked.queries == len(PROMPTS) * (BUDGET["times"] * BUDGET["steps"] + BUDGET["times"])
    assert np.isfinite(attacked.loss).all()


def test_a_prompt_is_attacked_alike_alone_and_among_others(pipeline, attacked):
    alone = unlearndiffatk.attack(pipeline, PROMPTS[1:], CAT, seed=1, target=pipeline, **BUDGET)
    assert alone.prompts == attacked.prompts[1:] and alone.loss == pytest.approx(attacked.loss[1:], rel=1e-5)


def test_one_program_serves_all_prompts_and_pipelines(pipeline, compilations):
    options = BUDGET | {"prefix": 3}
    unlearndiffatk.attack(pipeline, ("a dog", "do"), CAT, seed=5, target=pipeline, **options)
    assert compilations  # the counter counts
    unet = unflatten({path: 0.9 * np.asarray(leaf) for path, leaf in flatten(pipeline.params["unet"]).items()})
    compilations.clear()
    unlearndiffatk.attack(pipeline.with_params(unet=unet), ("de", "a cat"), CAT, seed=6, target=pipeline, **options)
    assert not compilations


def test_the_search_finds_a_word_that_is_better_than_most(pipeline):
    """Against every word of the vocabulary in the one slot, measured alike."""
    options = {**BUDGET, "prefix": 1, "times": 2, "steps": 60, "lr": 0.05}
    found = unlearndiffatk.attack(pipeline, ("a cat",), CAT, seed=1, target=pipeline, **options)
    words, slots = tokens.vocabulary(pipeline), tokens.before(pipeline, "a cat", 1)
    own = int(unlearndiffatk.base.generator(1, "a cat").integers(2**31))
    (latents,) = unlearndiffatk.base.pictures(pipeline, ["a cat"], [own], 2, 7.5)
    searched = unlearndiffatk.Own(slots, latents, np.uint32(own))
    of_word = functools.partial(
        stand_in.jitted, unlearndiffatk.measured, word_vectors.static_of(pipeline), models_of(pipeline), searched
    )
    losses = [float(of_word(np.array([number]))) for number in range(len(words.ids))]
    assert np.isclose(losses, found.loss[0], rtol=1e-5).any() and found.loss[0] <= np.quantile(losses, 0.2)


def test_weights_that_give_no_finite_loss_leave_the_prompt_as_it_was(pipeline):
    broken = {path: np.full_like(leaf, np.nan) for path, leaf in flatten(pipeline.params["unet"]).items()}
    unet = pipeline.with_params(unet=unflatten(broken))
    failed = unlearndiffatk.attack(unet, PROMPTS, CAT, seed=1, target=pipeline, **BUDGET)
    assert failed.prompts == PROMPTS and np.isnan(failed.loss).all()
    assert failed.queries <= len(PROMPTS) * (BUDGET["times"] * BUDGET["steps"] + BUDGET["times"])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"steps": 0}, "UnlearnDiffAtk: steps=0, expected at least 1"),
        ({"times": 0}, "times=0, expected at least 1"),
        ({"times": 2000}, "expected at most the 1000 times"),
        ({"prefix": 80}, "80 words to search for do not fit into a text of 77 tokens"),
        ({"target": None}, "needs `target`"),
        ({"concept": Concept("cat", ())}, "`erase` is empty"),
        ({"prompts": ()}, "no prompts"),
    ],
)
def test_bad_input(pipeline, change, match):
    given = {"pipeline": pipeline, "prompts": PROMPTS, "concept": CAT, "seed": 0, "target": pipeline} | BUDGET
    with pytest.raises(ValueError, match=match):
        unlearndiffatk.attack(**given | change)
