"""P4D: its loss and gradient against PyTorch, the goal, its budget, and prompts that are read as they were found."""

import functools

import jax
import numpy as np
import pytest

import convert
from spqr_jax import backbones
from spqr_jax.attacks import p4d, tokens
from spqr_jax.concepts import Concept
from spqr_jax.methods.tools import word_vectors
from spqr_jax.params import flatten, unflatten
from spqr_jax.pipeline import tokenize

torch = pytest.importorskip("torch")
from tests import stand_in

CAT = Concept("cat", ("cat", "nude"))
PROMPTS = ("a cat do", "nude dog")
BUDGET = {"length": 3, "steps": 8, "every": 3, "image_steps": 2}


@pytest.fixture(scope="module")
def target(reference):
    return stand_in.pipeline(convert.load(reference("sd1")[1]))


@pytest.fixture(scope="module")
def pipeline(target):
    """Other weights of the denoiser and of the text encoder's layers than the target's; the same token table."""
    flat = {name: flatten(target.params[name]) for name in ("unet", "text_encoder")}
    changed = {
        name: unflatten({p: np.asarray(x) * (1 if "token_embedding" in p else 1.3) for p, x in leaves.items()})
        for name, leaves in flat.items()
    }
    return target.with_params(**changed)


@pytest.fixture(scope="module")
def attacked(pipeline, target):
    return p4d.attack(pipeline, PROMPTS, CAT, seed=1, target=target, **BUDGET)


def torch_models(pipeline):
    return (
        make({path: leaf.detach() for path, leaf in stand_in.tensors(pipeline.params[name]).items()})
        for name, make in (("unet", stand_in.torch_unet), ("text_encoder", stand_in.torch_text))
    )


def models_of(pipeline, target) -> p4d.Models:
    own, unaligned, vectors = pipeline.params["unet"], target.params["unet"], tokens.vocabulary(pipeline).vectors
    return p4d.Models(own, pipeline.params["text_encoder"], unaligned, vectors, backbones.schedule(pipeline))


def test_loss_and_gradient_equal_pytorch(pipeline, target):
    """At the nearest words, towards the other model's prediction for the prompt that it reads itself."""
    words, slots = tokens.vocabulary(pipeline), tokens.before(pipeline, "", 2)
    rng, key = np.random.default_rng(0), jax.random.fold_in(jax.random.key(3), 5)
    vectors = 0.02 * rng.standard_normal((2, 32)).astype(np.float32)
    latents = rng.standard_normal((1, 8, 8, 4)).astype(np.float32)
    goal = backbones.condition(target, ["a cat"])
    given = np.int32(5), models_of(pipeline, target), p4d.Own(slots, goal, latents, np.uint32(3))
    static = word_vectors.static_of(pipeline)
    loss, grads = stand_in.jitted(p4d.gradient, static, {"vectors": vectors}, *given)

    table = torch.tensor(words.vectors)
    similar = torch.nn.functional.cosine_similarity(torch.tensor(vectors)[:, None], table[None], dim=-1)
    free = table[similar.argmax(1)].clone().requires_grad_()
    rows = torch.tensor(np.asarray(word_vectors.word_table(pipeline.params["text_encoder"])))[
        torch.tensor(slots.ids[0]).long()
    ]
    (unet, text), (other, read) = torch_models(pipeline), torch_models(target)
    ids = torch.tensor(tokenize(target, ["a cat"])).long()
    said = read(torch.tensor(np.asarray(word_vectors.word_table(target.params["text_encoder"])))[ids])
    noisy, _, t = stand_in.drawn(key, {"mean": latents, "std": np.zeros_like(latents)})
    theirs = torch.nn.functional.mse_loss(
        unet(noisy, t, text(torch.cat([rows[:1], free, rows[3:]])[None])), other(noisy, t, said)
    )
    expected = torch.autograd.grad(theirs, free)[0].numpy()
    assert float(loss) == pytest.approx(theirs.item(), rel=1e-4)
    assert np.abs(grads["vectors"] - expected).max() <= 1e-4 * np.abs(expected).max()


def test_what_is_found_is_read_as_the_words_that_were_found(pipeline, attacked):
    words = tokens.vocabulary(pipeline)
    for prompt in attacked.prompts:
        ids = tokenize(pipeline, [prompt])[0]
        assert [words.words[list(words.ids).index(i)] for i in ids[1:4]] == prompt.split()


def test_the_prompt_is_kept_behind_the_words_if_asked(pipeline, target):
    kept = p4d.attack(pipeline, PROMPTS, CAT, seed=1, target=target, keep=True, **BUDGET)
    for given, prompt in zip(PROMPTS, kept.prompts, strict=True):
        assert prompt.endswith(f" {given}") and len(prompt.split()) == 3 + len(given.split())


def test_the_budget_is_kept_and_counted(attacked):
    """8 steps, and candidates after 3, 6 and 8 of them."""
    assert attacked.queries == len(PROMPTS) * (8 + 3) and np.isfinite(attacked.loss).all()


def test_a_prompt_is_attacked_alike_alone_and_among_others(pipeline, target, attacked):
    alone = p4d.attack(pipeline, PROMPTS[1:], CAT, seed=1, target=target, **BUDGET)
    assert alone.prompts == attacked.prompts[1:] and alone.loss == pytest.approx(attacked.loss[1:], rel=1e-5)


def test_pictures_are_drawn_once_for_all_models(target, attacked, monkeypatch):
    """They are the target's. Another seed asks for others."""
    monkeypatch.setattr("spqr_jax.generate.generate", lambda *_, **__: pytest.fail("drawn again"))
    assert p4d.attack(target, PROMPTS, CAT, seed=1, target=target, **BUDGET).loss.shape == attacked.loss.shape
    with pytest.raises(pytest.fail.Exception, match="drawn again"):
        p4d.attack(target, PROMPTS, CAT, seed=2, target=target, **BUDGET)


def test_one_program_serves_all_prompts_and_pipelines(pipeline, target, compilations):
    options = BUDGET | {"length": 4}
    p4d.attack(pipeline, ("a dog", "do"), CAT, seed=5, target=target, **options)
    assert compilations  # the counter counts
    compilations.clear()
    p4d.attack(target, ("de", "a cat"), CAT, seed=6, target=target, **options)
    assert not compilations


def test_more_steps_find_a_better_prompt(pipeline, target):
    few, many = (
        p4d.attack(pipeline, ("a cat",), CAT, seed=1, target=target, **BUDGET | {"steps": steps, "every": 10})
        for steps in (1, 100)
    )
    assert many.loss[0] < few.loss[0]


def test_the_prompt_itself_has_no_loss_on_the_unaligned_model(target):
    """If the words are those of the prompt, both models are one and predict alike."""
    words, slots = tokens.vocabulary(target), tokens.before(target, "", 2)
    latents = np.random.default_rng(0).standard_normal((1, 8, 8, 4)).astype(np.float32)
    own = p4d.Own(slots, backbones.condition(target, ["a cat"]), latents, np.uint32(0))
    of_words = functools.partial(
        stand_in.jitted, p4d.measured, word_vectors.static_of(target), models_of(target, target), own
    )
    chosen = np.array([words.words.index("a"), words.words.index("cat")])
    assert of_words(chosen) < 1e-10 < of_words(chosen[::-1])


def test_weights_that_give_no_finite_loss_leave_the_prompt_as_it_was(pipeline, target):
    broken = {path: np.full_like(leaf, np.nan) for path, leaf in flatten(pipeline.params["unet"]).items()}
    unet = pipeline.with_params(unet=unflatten(broken))
    failed = p4d.attack(unet, PROMPTS, CAT, seed=1, target=target, **BUDGET)
    assert failed.prompts == PROMPTS and np.isnan(failed.loss).all()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"steps": 0}, "P4D: steps=0, expected at least 1"),
        ({"every": 0}, "every=0, expected at least 1"),
        ({"length": 80}, "80 words to search for do not fit into a text of 77 tokens"),
        ({"target": None}, "needs `target`"),
        ({"concept": Concept("cat", ())}, "`erase` is empty"),
        ({"prompts": ()}, "no prompts"),
    ],
)
def test_bad_input(target, change, match):
    given = {"pipeline": target, "prompts": PROMPTS, "concept": CAT, "seed": 0, "target": target} | BUDGET
    with pytest.raises(ValueError, match=match):
        p4d.attack(**given | change)
