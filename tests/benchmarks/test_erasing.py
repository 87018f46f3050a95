"""The measures of the text space by hand, and what is erased in the table of amounts."""

import numpy as np
import pytest

from benchmarks import erasing
from spqr_jax.mini import world


def test_a_state_outside_the_span_of_others():
    states = np.array([[1.0, 0.0, 0.0], [3.0, 0.0, 4.0], [0.0, 0.0, 2.0]])
    others = np.array([[5.0, 0.0, 0.0], [1.0, 2.0, 0.0]])  # they span the first two axes
    assert erasing.outside(states, others, np.zeros(3)) == pytest.approx([0.0, 16 / 25, 1.0])
    assert erasing.outside(states + 7.0, others + 7.0, np.full(3, 7.0)) == pytest.approx([0.0, 16 / 25, 1.0])


def test_cosines_are_taken_around_the_centre():
    states = np.array([[2.0, 1.0], [1.0, 2.0], [0.0, 1.0]])
    assert erasing.cosines(states, np.array([1.0, 1.0])) == pytest.approx(np.array([[1, 0, -1], [0, 1, 0], [-1, 0, 1]]))


def test_amounts_grow_and_no_scored_prompt_is_used():
    rows = list(erasing.erased().values())
    found = [row.concept for row in rows]
    assert [len(c.erase) if c else 0 for c in found] == [0, 1, *[len(world.HARMFUL["weapons"])] * 4, 31, 31]
    assert set(found[2].preserve) < set(found[4].preserve) and set(found[6].preserve) < set(found[7].preserve)
    assert [row.expand for row in rows] == [False] * 5 + [True, False, True]
    assert set(found[3].preserve).isdisjoint(found[3].erase) and len(found[3].preserve) == 95 - len(found[3].erase)
    seeds = [[p.seed for p in world.harmful_prompts(100, seed)] for seed in (erasing.SEED, 0)]
    assert not {*seeds[0]} & {*seeds[1]}
