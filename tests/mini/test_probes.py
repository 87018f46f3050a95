"""Prompt sets beside the score: what they name, and that the nearest objects are the nearest ones."""

import numpy as np
import pytest

import convert
from benchmarks.erasing import cosines, name_states
from judges.inception import Inception
from spqr_jax import mini
from spqr_jax.mini import emoji, probes, world

HARMFUL = {code: word for codes in world.HARMFUL.values() for code, word in codes.items()}
NAMES = {**HARMFUL, **world.BENIGN}


def named(kind: str, n: int = 40, erased: str = "") -> set[str]:
    """The objects of a set, by code point."""
    return {prompt.object for prompt in probes.prompts(kind, n, 0, erased)}


@pytest.mark.parametrize("erased", ["", "weapons", "blood_death"])
def test_prompts_are_distinct_drawn_with_the_seed_and_about_the_right_objects(erased):
    concept = set(world.HARMFUL[erased] if erased else HARMFUL)
    for kind in ("lookalikes", "neighbours", "implicit"):
        drawn = probes.prompts(kind, 40, 0, erased)
        assert len({prompt.prompt for prompt in drawn}) == 40
        assert drawn[:10] == probes.prompts(kind, 10, 0, erased) != probes.prompts(kind, 10, 1, erased)
    assert named("implicit", erased=erased) <= concept == named("named", 100, erased=erased)
    assert all(HARMFUL[prompt.object] in prompt.prompt for prompt in probes.prompts("named", 100, 0, erased))
    assert named("lookalikes", erased=erased) | named("neighbours", erased=erased) <= set(world.BENIGN)
    if erased:
        assert named("others", 100, erased=erased) == set(HARMFUL) - concept


def test_implicit_prompts_have_no_word_of_the_name():
    drawn = probes.prompts("implicit", 200, 0)
    assert len({prompt.object for prompt in drawn}) == 13
    for prompt in drawn:
        plain = world.caption(world.Picture(prompt.object, prompt.style, prompt.background), word="")
        own = set(HARMFUL[prompt.object].split()) - set(plain.split())
        assert prompt.keyword and not own & set(prompt.prompt.replace(",", "").split())
        assert world.KEYWORDS[prompt.object] in prompt.prompt


def test_sets_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="mini:others is empty where all is erased; set concept to mini:CATEGORY"):
        mini.prompts("others", 4, 0)
    with pytest.raises(ValueError, match=r"mini:else is unknown; expected one of harmful, weapons.*benign, lookalikes"):
        mini.prompts("else", 4, 0)
    with pytest.raises(ValueError, match="asked for 145 prompts, only 144 distinct ones exist"):
        mini.prompts("implicit", 145, 0, "weapons")


@pytest.mark.slow  # reads two models
def test_the_nearest_objects_are_those_of_the_models():
    pictures = [world.Picture(code, style, "white") for style in world.SEEN_STYLES for code in NAMES]
    features = Inception.open(mini.judge_path("features"))(emoji.render(pictures))
    by_style = features.reshape(len(world.SEEN_STYLES), len(NAMES), -1).astype(np.float64)
    looks = np.mean([cosines(one, one.mean(axis=0)) for one in by_style], axis=0)
    states = name_states(convert.load(mini.model_path()), list(NAMES.values()))
    words, benign = cosines(states, states.mean(axis=0)), list(world.BENIGN.values())
    found = {
        name: tuple(benign[int(np.argmax(table[i, len(HARMFUL) :]))] for table in (looks, words))
        for i, name in enumerate(HARMFUL.values())
    }
    assert found == probes.NEAREST
