"""Prior preservation: data, order and weights of DreamBooth's batches."""

import numpy as np
import pytest

from spqr_jax import data
from spqr_jax.training import prior
from spqr_jax.training.prior import Prior


def pictures(count: int, size: int = 4, first: int = 0) -> np.ndarray:
    return np.stack([np.full((size, size, 3), first + i, np.uint8) for i in range(count)])


def dataset(count: int, size: int = 4) -> data.Dataset:
    return data.from_arrays(pictures(count, size), ["x"] * count, "mine")


def test_pictures_then_class_pictures_in_any_order():
    joined = prior.joined(dataset(2), "a sks dog", pictures(3, first=100), "a dog")
    assert joined.captions == ("a sks dog",) * 2 + ("a dog",) * 3
    assert joined.images(np.array([4, 0, 2, 1]))[:, 0, 0, 0].tolist() == [102, 0, 100, 1]
    assert joined.images(np.array([3, 3]))[:, 0, 0, 0].tolist() == [101, 101]
    other = prior.joined(dataset(2), "a sks dog", pictures(3, first=101), "a dog")
    assert joined.name != other.name, "the latents' cache knows class pictures by their content"


def test_every_batch_is_half_and_half_and_a_pass_shows_all():
    own = Prior(2, 6, 0.5)
    batches = prior.batches(own, 4, 3, seed=1)
    assert all((one.rows < 2).tolist() == [True, True, False, False] for one in batches)
    shown = np.concatenate([one.rows for one in batches])
    assert sorted(shown[shown >= 2].tolist()) == [2, 3, 4, 5, 6, 7]
    assert np.bincount(shown[shown < 2]).tolist() == [3, 3]
    assert prior.weights(own, batches[0].rows).tolist() == [0.5, 0.5, 0.25, 0.25]


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="batch_size 3 must be even"):
        prior.batches(Prior(2, 2), 3, 1, seed=0)
    with pytest.raises(ValueError, match=r"pictures are \(4, 4\) pixels, class pictures \(8, 8\)"):
        prior.joined(dataset(2), "a", pictures(2, 8), "b")
    with pytest.raises(ValueError, match="2 pictures and 0 class pictures"):
        prior.joined(dataset(2), "a", pictures(2)[:0], "b")
