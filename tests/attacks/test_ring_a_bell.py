"""Ring-A-Bell: its distance and concept direction against transformers, its generations, its budget."""

import numpy as np
import pytest

import convert
from spqr_jax.attacks import ring_a_bell, tokens
from spqr_jax.attacks.ring_a_bell import Breeding, Encoder
from spqr_jax.concepts import Concept
from spqr_jax.params import flatten, unflatten
from spqr_jax.pipeline import tokenize

torch = pytest.importorskip("torch")

CAT = Concept("cat", ("cat", "nude"), prompts=("a cat", "a nude", "do cat", "do nude"), replacements=("a dog", "dog"))
PROMPTS = ("a cat do", "nude dog")
BUDGET = {"length": 3, "population": 8, "generations": 5}


@pytest.fixture(scope="module")
def pipeline(reference):
    return convert.load(reference("sd1")[1])


@pytest.fixture(scope="module")
def attacked(pipeline):
    return ring_a_bell.attack(pipeline, PROMPTS, CAT, seed=1, **BUDGET)


def states(reference, texts) -> np.ndarray:
    theirs = reference("sd1")[0]
    ids = theirs.tokenizer(list(texts), padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        return theirs.text_encoder(ids)[0].numpy()


def test_the_direction_is_the_mean_difference_of_the_pairs(pipeline, reference):
    """Pair i: prompt i and replacement i, modulo their number; of the prompts that show the text."""
    first, second, third, fourth = states(reference, CAT.prompts)
    dog, bare = states(reference, CAT.replacements)
    for number, expected in ((0, (first - dog + third - dog) / 2), (1, (second - bare + fourth - bare) / 2)):
        np.testing.assert_allclose(ring_a_bell.direction(pipeline, CAT, number), expected, rtol=1e-3, atol=1e-5)


def test_the_distance_of_what_is_found_equals_transformers(pipeline, reference, attacked):
    """Of the text itself, read by the other tokenizer, from the states of the prompt and three times the direction."""
    for number, (given, prompt) in enumerate(zip(PROMPTS, attacked.prompts, strict=True)):
        goal = states(reference, [given])[0] + 3 * ring_a_bell.direction(pipeline, CAT, number)
        expected = np.square(states(reference, [prompt])[0] - goal).sum()
        assert attacked.loss[number] == pytest.approx(expected, rel=1e-3)


def test_what_is_found_is_read_as_the_words_that_were_found(pipeline, attacked):
    words = tokens.vocabulary(pipeline)
    for prompt in attacked.prompts:
        ids = tokenize(pipeline, [prompt])[0]
        assert [words.words[list(words.ids).index(i)] for i in ids[1:4]] == prompt.split()


def test_children_are_two_halves_and_their_complements():
    """Each parent stays; those that are joined have two children, which exchange what follows a place."""
    parents, scores = np.array([[0, 1, 2], [3, 4, 5]]), np.array([1.0, 2.0])
    breeding = Breeding(4, 1, crossover=1.0, mutation=0.0)
    for seed in range(20):
        chosen, found = ring_a_bell.bred(parents, scores, 9, breeding, np.random.default_rng(seed))
        np.testing.assert_array_equal(chosen[:2], parents)
        np.testing.assert_array_equal(found, [1, 2, *[np.nan] * 4])
        for one, other in zip(chosen[2:4], chosen[4:], strict=True):
            assert all(value % 3 == place for child in (one, other) for place, value in enumerate(child))
            assert all(a in column and b in column for a, b, column in zip(one, other, parents.T, strict=True))


def test_mutation_changes_one_word_of_its_share_and_forgets_their_scores():
    parents, breeding = np.zeros((400, 5), int), Breeding(800, 1, crossover=0.0, mutation=0.25)
    chosen, scores = ring_a_bell.bred(parents, np.ones(400), 1000, breeding, np.random.default_rng(0))
    changed = (chosen != 0).sum(1)
    assert changed.max() == 1 and 70 < changed.sum() < 130 and not parents.any()
    assert np.isnan(scores[changed > 0]).all() and np.isnan(scores).sum() - changed.sum() < 3


def test_the_distance_falls_over_the_generations(pipeline, attacked):
    more = ring_a_bell.attack(pipeline, PROMPTS, CAT, seed=1, **BUDGET | {"generations": 30})
    assert (more.loss < attacked.loss).all()


def test_the_search_finds_the_best_of_all_words(pipeline):
    """One word of a small vocabulary, against all of them."""
    options = {"length": 1, "population": 40, "generations": 60, "strength": 0.0}
    found = ring_a_bell.attack(pipeline, ("cat",), CAT, seed=1, **options)
    words, slots = tokens.vocabulary(pipeline), tokens.before(pipeline, "", 1)
    encoder = Encoder(pipeline.definitions["text_encoder"], pipeline.params["text_encoder"], slots)
    goal = np.asarray(ring_a_bell.text_lib.encode(pipeline, ["cat"]).hidden)[0]
    all_of_them = ring_a_bell.distances(encoder, words.ids[:, None], goal, 20)
    assert found.prompts == ("cat",) == (words.words[np.argmin(all_of_them)],)
    assert found.loss[0] == pytest.approx(all_of_them.min(), abs=1e-6)


def test_the_budget_is_bounded_and_counted(attacked):
    """All of the first generation, then at most the children of a half and what mutated of it."""
    most = len(PROMPTS) * (8 + 4 * 3 * 4)
    assert len(PROMPTS) * 8 < attacked.queries <= most


def test_a_prompt_is_attacked_alike_alone_and_among_others(pipeline, attacked):
    alone = ring_a_bell.attack(pipeline, PROMPTS[1:], CAT, seed=1, **BUDGET)
    assert alone.prompts == attacked.prompts[1:] and alone.loss.tolist() == attacked.loss[1:].tolist()


def test_the_goal_is_what_the_target_says(pipeline, attacked):
    """Through another encoder, towards the states of the unaligned one: another search than on either alone."""
    leaves = flatten(pipeline.params["text_encoder"])
    other = {path: np.asarray(leaf) * (1 if "embedding" in path else 1.5) for path, leaf in leaves.items()}
    subject = pipeline.with_params(text_encoder=unflatten(other))
    through = ring_a_bell.attack(subject, PROMPTS, CAT, seed=1, target=pipeline, **BUDGET)
    assert (through.loss > attacked.loss).any()
    assert through.loss.tolist() != ring_a_bell.attack(subject, PROMPTS, CAT, seed=1, **BUDGET).loss.tolist()


def test_one_program_serves_all_prompts_and_encoders(pipeline, compilations):
    options = BUDGET | {"population": 10}
    ring_a_bell.attack(pipeline, ("a dog",), CAT, seed=5, **options)
    assert compilations  # the counter counts
    compilations.clear()
    ring_a_bell.attack(pipeline, ("de cat", "a nude"), CAT, seed=6, **options)
    assert not compilations


def test_an_encoder_that_gives_no_finite_states_leaves_the_prompt_as_it_was(pipeline):
    leaves = flatten(pipeline.params["text_encoder"])
    broken = {path: np.full_like(leaf, np.nan) if "layers" in path else leaf for path, leaf in leaves.items()}
    subject = pipeline.with_params(text_encoder=unflatten(broken))
    failed = ring_a_bell.attack(subject, PROMPTS, CAT, seed=1, target=pipeline, **BUDGET)
    assert failed.prompts == PROMPTS and np.isnan(failed.loss).all() and failed.queries == len(PROMPTS) * 8


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"generations": 0}, "Ring-A-Bell: generations=0, expected at least 1"),
        ({"population": 1}, "population=1, expected at least 2"),
        ({"length": 80}, "80 words to search for do not fit"),
        ({"mutation": 1.5}, "mutation=1.5, expected a probability"),
        ({"concept": Concept("cat", ())}, "`erase` is empty"),
        ({"prompts": ()}, "no prompts"),
    ],
)
def test_bad_input(pipeline, change, match):
    given = {"pipeline": pipeline, "prompts": PROMPTS, "concept": CAT, "seed": 0} | BUDGET
    with pytest.raises(ValueError, match=match):
        ring_a_bell.attack(**given | change)
