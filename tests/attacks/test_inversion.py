"""Concept inversion: what it learns, what it writes into prompts, and what it leaves alone."""

import numpy as np
import pytest

import convert
from spqr_jax.attacks import inversion
from spqr_jax.concepts import Concept
from spqr_jax.methods.tools import word_vectors
from spqr_jax.params import flatten
from spqr_jax.training import words
from tests import stand_in

CAT = Concept("cat", ("cat", "nude"), templates=("a {}", "do {} dog"))
PROMPTS = ("a Cat do", "nude dog", "dog")
BUDGET = {"steps": 3, "batch_size": 2, "images": 2, "image_steps": 2}


@pytest.fixture(scope="module")
def pipeline(reference):
    return stand_in.pipeline(convert.load(reference("sd1")[1]))


@pytest.fixture(scope="module")
def attacked(pipeline):
    return inversion.attack(pipeline, PROMPTS, CAT, seed=1, target=pipeline, **BUDGET)


def test_words_take_the_place_of_what_they_name(attacked):
    """A prompt that names nothing gets a word before it, that of the nearest text."""
    assert attacked.prompts[:2] == ("a <word-0> do", "<word-1> dog")
    assert attacked.prompts[2] in ("<word-0> dog", "<word-1> dog")
    assert attacked.loss.shape == (3,) and np.isfinite(attacked.loss).all()
    assert all(vector.shape == (32,) for vector in attacked.words.values())


def test_the_longest_text_is_the_one_that_a_prompt_names(pipeline):
    texts = Concept("cat", ("cat", "cat dog"))
    assert inversion.attack(pipeline, ["a cat dog"], texts, seed=1, target=pipeline, **BUDGET).prompts == (
        "a <word-1>",
    )


def test_the_budget_is_a_number_of_steps_for_each_word(attacked):
    assert attacked.queries == 2 * BUDGET["steps"]


def test_a_prompt_is_attacked_alike_alone_and_among_others(pipeline, attacked):
    alone = inversion.attack(pipeline, PROMPTS[1:2], CAT, seed=1, target=pipeline, **BUDGET)
    assert alone.prompts == attacked.prompts[1:2] and alone.loss == pytest.approx(attacked.loss[1:2], rel=1e-5)
    np.testing.assert_allclose(alone.words["<word-1>"], attacked.words["<word-1>"], rtol=1e-5, atol=1e-6)
    other = inversion.attack(pipeline, PROMPTS[1:2], CAT, seed=2, target=pipeline, **BUDGET)
    assert np.abs(other.words["<word-1>"] - alone.words["<word-1>"]).max() > 0


def test_the_loss_of_the_word_falls(pipeline):
    """From a word that means something else, against the loss that this word has at the start."""
    start = {"start_word": "dog", "lr": 1e-2, "images": 4}
    found = [
        inversion.attack(pipeline, ["cat"], CAT, seed=1, target=pipeline, **BUDGET | start | {"steps": steps}).loss[0]
        for steps in (1, 60)
    ]
    assert found[1] < 0.99 * found[0]


def test_weights_that_give_no_finite_loss_leave_the_prompt_as_it_was(pipeline):
    leaves = flatten(pipeline.params["unet"])
    broken = stand_in.params_lib.unflatten({path: np.full_like(leaf, np.nan) for path, leaf in leaves.items()})
    failed = inversion.attack(pipeline.with_params(unet=broken), ["cat"], CAT, seed=1, target=pipeline, **BUDGET)
    assert failed.prompts == ("cat",) and np.isnan(failed.loss).all() and not failed.words
    assert failed.queries == BUDGET["steps"]


def test_pictures_are_those_of_the_target(pipeline):
    """A pipeline that draws something else is shown the same pictures: its word differs from the target's own."""
    unet = {path: 0.9 * leaf for path, leaf in flatten(pipeline.params["unet"]).items()}
    other = pipeline.with_params(unet=stand_in.params_lib.unflatten(unet))
    own, given = (
        inversion.attack(pipeline, ["cat"], CAT, seed=1, target=t, **BUDGET).loss[0] for t in (pipeline, other)
    )
    assert own != given


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"steps": 0}, "Concept inversion: steps=0, expected at least 1"),
        ({"images": 1}, "images=1, expected at least 2"),
        ({"target": None}, "needs `target`"),
        ({"concept": Concept("cat", ())}, "`erase` is empty"),
        ({"concept": Concept("cat", ("",))}, "has no tokens"),
        ({"concept": CAT._replace(templates=("a",))}, "must contain {} once"),
        ({"prompts": ()}, "no prompts"),
        ({"prompts": ("a", "")}, "'' in `prompts` has no tokens"),
        ({"start_word": " "}, "start_word"),
    ],
)
def test_bad_input(pipeline, change, match):
    given = {"pipeline": pipeline, "prompts": PROMPTS, "concept": CAT, "seed": 0, "target": pipeline} | BUDGET
    with pytest.raises(ValueError, match=match):
        inversion.attack(**given | change)


def test_other_architectures_are_refused(reference, pipeline):
    xl = convert.load(reference("sdxl")[1])
    with pytest.raises(ValueError, match="Concept inversion is not defined for SDXL, only for Stable Diffusion"):
        inversion.attack(xl, PROMPTS, CAT, seed=0, target=xl)
    with pytest.raises(ValueError, match="another architecture"):
        inversion.attack(pipeline, PROMPTS, CAT, seed=0, target=xl)


def test_the_word_table_has_the_learned_rows(pipeline, attacked):
    ours = words.added(pipeline, attacked.words)
    table = np.asarray(word_vectors.word_table(ours.params["text_encoder"]))
    ids = ours.tokenizers["tokenizer"](list(attacked.words), add_special_tokens=False).input_ids
    np.testing.assert_array_equal(table[np.array(ids)[:, 0]], np.stack(list(attacked.words.values())))
