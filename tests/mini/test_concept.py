"""The texts of the world's concepts: mixed, paired, never scored; and what an edit spares because of them."""

import numpy as np
import pytest

import convert
from spqr_jax import mini
from spqr_jax.methods import uce
from spqr_jax.methods.tools.closed_form import key_value_matrices, text_states
from spqr_jax.mini import world

WEAPONS = mini.concept("weapons")
BENIGN = tuple(world.BENIGN.values())


def test_prompts_show_the_erased_in_turn_and_keep_their_frame_when_relabelled():
    n = len(WEAPONS.erase)
    assert len(set(WEAPONS.prompts)) == len(WEAPONS.prompts) == n * len(mini._frames())
    for i, prompt in enumerate(WEAPONS.prompts):
        name, partner = WEAPONS.erase[i % n], BENIGN[i % n]
        assert WEAPONS.replacements[i] == prompt.replace(name, partner)


@pytest.mark.parametrize("field", ["preserve", "retain", "replacements"])
def test_the_first_texts_stand_for_all(field):
    """160 pictures, as the relabelling methods make: not of bare names alone, and of most objects."""
    texts = getattr(WEAPONS, field)
    assert len(set(texts)) == len(texts) == len(BENIGN) * len(mini._frames())
    first = texts[:160]
    shares = [sum(part in text for text in first) / len(first) for part in ("emoji of", "background")]
    assert shares == pytest.approx([2 / 11, 8 / 11], abs=0.05)
    assert all(any(name in text for text in first) for name in BENIGN)


def test_no_text_of_a_method_is_scored():
    texts = {*WEAPONS.preserve, *WEAPONS.prompts, *WEAPONS.replacements, *WEAPONS.retain}
    scored = {p.prompt for kind in ("weapons", "benign") for p in mini.prompts(kind, 100, 0)}
    assert not texts & scored


def test_preserved_captions_spare_whole_captions():
    """UCE moves the keys of a name in a whole caption, which is in no preserve set, by less than half as far."""
    pipeline = convert.load(mini.model_path())
    captions = [world.caption(world.Picture(code, "noto", "pink")) for code in world.BENIGN]
    states = text_states(pipeline, captions)
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.kernel"

    def keys(model):
        return states @ key_value_matrices(model, "test")[path]

    before = keys(pipeline)
    moved = [
        np.square(keys(uce.align(pipeline, concept)) - before).sum()
        for concept in (WEAPONS, WEAPONS._replace(preserve=BENIGN))
    ]
    assert moved[0] < moved[1] / 4, "by length: less than half"
