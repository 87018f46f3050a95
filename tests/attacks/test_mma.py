"""MMA-Diffusion, text part: loss and gradient against transformers, its candidates, forbidden words, its budget."""

import jax
import numpy as np
import pytest

import convert
from spqr_jax.attacks import mma, tokens
from spqr_jax.concepts import Concept
from spqr_jax.methods.tools import loop, word_vectors
from spqr_jax.params import flatten, unflatten
from spqr_jax.pipeline import tokenize

torch = pytest.importorskip("torch")

CAT = Concept("cat", ("cat", "nude"))
PROMPTS = ("a cat do", "nude dog")
BUDGET = {"length": 3, "steps": 5, "candidates": 12, "top": 6}


@pytest.fixture(scope="module")
def pipeline(reference):
    return convert.load(reference("sd1")[1])


@pytest.fixture(scope="module")
def attacked(pipeline):
    return mma.attack(pipeline, PROMPTS, CAT, seed=1, **BUDGET)


def pooled(reference, texts):
    """(pooled states [B, E], word vectors [B, L, C] that they can be differentiated by), by transformers."""
    theirs, seen = reference("sd1")[0], []
    ids = theirs.tokenizer(list(texts), padding="max_length", max_length=77, return_tensors="pt").input_ids

    def keep(module, inputs, output):
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    with_hook = theirs.text_encoder.get_input_embeddings().register_forward_hook(keep)
    try:
        return theirs.text_encoder(ids).pooler_output, seen[0]
    finally:
        with_hook.remove()


def test_loss_and_gradient_equal_transformers(pipeline, reference):
    words, slots = tokens.vocabulary(pipeline), tokens.before(pipeline, "", 3)
    chosen = np.array([words.words.index(word) for word in ("dog", "cat", "a")])
    goal = np.asarray(mma.text_lib.encode(pipeline, ["a dog"], pooled=True).embeds)[0]
    model = pipeline.definitions["text_encoder"], loop.on_device(pipeline.params["text_encoder"])

    def ours(vectors):
        return mma.loss(*model, slots.ids, slots.places, vectors[None], goal)[0]

    value, slope = jax.jit(jax.value_and_grad(ours))(words.vectors[chosen])
    found, vectors = pooled(reference, ["dog cat a"])
    with torch.no_grad():
        wanted = pooled(reference, ["a dog"])[0]
    theirs = 1 - torch.nn.functional.cosine_similarity(found, wanted, dim=1, eps=1e-6)[0]
    expected = torch.autograd.grad(theirs, vectors)[0][0, 1:4].numpy()
    assert float(value) == pytest.approx(theirs.item(), abs=1e-5)
    assert np.abs(slope - expected).max() <= 1e-3 * np.abs(expected).max()


def test_candidates_change_one_word_each_to_one_that_promises_most(pipeline):
    """Places in turn, words among the `top` steepest ones of that place; the prompt itself is no candidate."""
    words, slots = tokens.vocabulary(pipeline), tokens.before(pipeline, "", 3)
    setting, chosen = mma.Setting(pipeline.definitions["text_encoder"], 4, 12, 1), np.array([0, 1, 2])
    goal = np.asarray(mma.text_lib.encode(pipeline, ["a dog"], pooled=True).embeds)[0]
    encoder = loop.on_device(pipeline.params["text_encoder"])
    inputs = encoder, words.vectors, slots.ids, slots.places, goal, chosen, jax.random.key(0)
    tried, losses = jax.jit(mma.step, static_argnums=0)(setting, *inputs)

    @jax.jit
    def own(vectors):
        return mma.loss(setting.definition, encoder, slots.ids, slots.places, vectors[None], goal)[0]

    slope = np.asarray(jax.grad(own)(words.vectors[chosen])) @ words.vectors.T
    for number, (one, reached) in enumerate(zip(np.asarray(tried), np.asarray(losses), strict=True)):
        place = number // 4
        assert (np.delete(one, place) == np.delete(chosen, place)).all()
        assert slope[place, one[place]] <= np.sort(slope[place])[3] + 1e-7
        if (one == chosen).all():
            assert np.isinf(reached)
        else:
            assert reached == pytest.approx(float(own(words.vectors[one])), abs=1e-5)


def test_the_loss_is_that_of_the_prompt_as_transformers_reads_it(attacked, reference):
    with torch.no_grad():
        found, wanted = (pooled(reference, texts)[0] for texts in (attacked.prompts, PROMPTS))
    expected = 1 - torch.nn.functional.cosine_similarity(found, wanted, dim=1)
    np.testing.assert_allclose(attacked.loss, expected.numpy(), atol=1e-4)


def test_words_of_the_concept_are_never_used(pipeline):
    """By themselves and, from four letters on, within others; so with words of the caller's own."""
    plain = tokens.vocabulary(pipeline)
    less = tokens.vocabulary(pipeline, ["Dog", "a", "ca"])
    assert set(plain.words) - set(less.words) == {"dog", "a"} & set(plain.words) == {"dog", "a"}
    found = mma.attack(pipeline, PROMPTS, CAT, seed=1, forbidden=("dog", "do"), **BUDGET | {"length": 1, "steps": 20})
    assert not {"cat", "nude", "dog", "do"} & set(" ".join(found.prompts).split())


def test_a_forbidden_word_is_found_within_a_longer_one(pipeline):
    """In the emoji world's larger vocabulary."""
    from spqr_jax.methods.contract import tiny

    world = tiny.pipeline("sd")
    plain, less = (set(tokens.vocabulary(world, banned).words) for banned in ((), ("fire", "axe")))
    assert {"fire", "axe", "firecracker"} <= plain - less
    assert all("fire" in word or word == "axe" for word in plain - less)


def test_every_word_of_the_vocabulary_is_read_as_itself_beside_any_other():
    from spqr_jax.methods.contract import tiny

    world = tiny.pipeline("sd")
    words, rng = tokens.vocabulary(world), np.random.default_rng(0)
    assert len(words.ids) > 1000
    for _ in range(200):
        chosen = rng.integers(len(words.ids), size=4)
        read = world.tokenizers["tokenizer"](tokens.text(words, chosen, ""), add_special_tokens=False).input_ids
        assert read == words.ids[chosen].tolist()


def test_more_steps_and_restarts_find_a_better_prompt(pipeline, attacked):
    more = mma.attack(pipeline, PROMPTS, CAT, seed=1, **BUDGET | {"steps": 40})
    assert (more.loss <= attacked.loss).all() and (more.loss < attacked.loss).any()
    again = mma.attack(pipeline, PROMPTS, CAT, seed=1, restarts=3, **BUDGET)
    assert (again.loss <= attacked.loss).all() and again.queries == 3 * attacked.queries


def test_the_budget_is_kept_and_counted(attacked):
    assert attacked.queries == len(PROMPTS) * BUDGET["steps"] * BUDGET["candidates"]


def test_a_prompt_is_attacked_alike_alone_and_among_others(pipeline, attacked):
    alone = mma.attack(pipeline, PROMPTS[1:], CAT, seed=1, **BUDGET)
    assert alone.prompts == attacked.prompts[1:] and alone.loss.tolist() == attacked.loss[1:].tolist()


def test_one_program_serves_all_prompts(pipeline, compilations):
    options = BUDGET | {"length": 4}
    mma.attack(pipeline, ("a dog",), CAT, seed=5, **options)
    assert compilations  # the counter counts
    compilations.clear()
    mma.attack(pipeline, ("de cat", "a nude"), CAT, seed=6, **options)
    assert not compilations


def test_an_encoder_that_gives_no_finite_states_leaves_the_prompt_as_it_was(pipeline):
    leaves = flatten(pipeline.params["text_encoder"])
    broken = {path: np.full_like(leaf, np.nan) if "layers" in path else leaf for path, leaf in leaves.items()}
    subject = pipeline.with_params(text_encoder=unflatten(broken))
    failed = mma.attack(subject, PROMPTS, CAT, seed=1, target=pipeline, **BUDGET)
    assert failed.prompts == PROMPTS and np.isnan(failed.loss).all()


def test_what_is_found_is_read_as_the_words_that_were_found(pipeline, attacked):
    for prompt in attacked.prompts:
        ids = tokenize(pipeline, [prompt])[0]
        table = np.asarray(word_vectors.word_table(pipeline.params["text_encoder"]))
        assert len(prompt.split()) == 3 and ids[4] == tokenize(pipeline, [""])[0][1] and len(table) > ids.max()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"steps": 0}, "MMA-Diffusion: steps=0, expected at least 1"),
        ({"candidates": 0}, "candidates=0, expected at least 1"),
        ({"length": 80}, "80 words to search for do not fit"),
        ({"concept": Concept("cat", ())}, "`erase` is empty"),
        ({"prompts": ()}, "no prompts"),
    ],
)
def test_bad_input(pipeline, change, match):
    given = {"pipeline": pipeline, "prompts": PROMPTS, "concept": CAT, "seed": 0} | BUDGET
    with pytest.raises(ValueError, match=match):
        mma.attack(**given | change)
