"""Data sets, curricula and the order of samples."""

import itertools

import numpy as np
import pytest

from spqr_jax import data, finetune

IMAGES = np.zeros((3, 4, 4, 3), np.uint8)


def order(stages, batch=4, steps=50, seed=1) -> list[list[int]]:
    return [rows.tolist() for rows in data.sample_order(stages, batch, steps, seed)]


def test_from_arrays_gives_the_rows_asked_for():
    images = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    dataset = data.from_arrays(images, ["a", "b", "c"], "letters")
    assert len(dataset) == 3 and dataset.captions == ("a", "b", "c") and dataset.name == "letters"
    np.testing.assert_array_equal(dataset.images(np.array([2, 0])), images[[2, 0]])


@pytest.mark.parametrize(
    ("images", "captions", "message"),
    [
        (IMAGES.astype(np.float32), ["a"] * 3, r"uint8 \[N, H, W, 3\], found float32"),
        (IMAGES[..., :1], ["a"] * 3, r"found uint8 \(3, 4, 4, 1\)"),
        (IMAGES[0], ["a"] * 4, r"found uint8 \(4, 4, 3\)"),
        (IMAGES, ["a"] * 2, "3 images but 2 captions"),
    ],
)
def test_refuses_pictures_and_captions_that_do_not_fit(images, captions, message):
    with pytest.raises(ValueError, match=message):
        data.from_arrays(images, captions)


def test_curriculum_stages():
    assert data.curriculum_stages(7, ()) == [7]
    assert data.curriculum_stages(5000, (1000, 3000, 5000)) == [1000, 3000, 5000]


@pytest.mark.parametrize(
    ("size", "curriculum", "message"),
    [
        (0, (), "data set is empty"),
        (0, (1,), "data set is empty"),
        (10, (5, 5), "increasing"),
        (10, (5, 3), "increasing"),
        (10, (0, 5), "increasing positive"),
        (4000, (1000, 3000, 5000), "asks for 5000 samples, the data set has 4000"),
    ],
)
def test_curriculum_errors(size, curriculum, message):
    with pytest.raises(ValueError, match=message):
        data.curriculum_stages(size, curriculum)


def test_every_epoch_shows_every_sample_once_in_a_new_order():
    rows = list(itertools.chain(*order([10], batch=5, steps=6)))
    epochs = [rows[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_epochs_continue_across_batches():
    """7 samples in batches of 4: no sample is dropped at the end of an epoch."""
    rows = list(itertools.chain(*order([7], batch=4, steps=7)))
    assert [sorted(rows[i : i + 7]) for i in (0, 7, 14, 21)] == [list(range(7))] * 4


def test_a_batch_may_be_larger_than_the_data():
    (rows,) = order([3], batch=8, steps=1)
    assert len(rows) == 8 and sorted(rows[:3]) == sorted(rows[3:6]) == [0, 1, 2]


def test_order_is_a_function_of_the_seed():
    assert order([20]) == order([20])
    assert order([20]) != order([20], seed=2)


def test_a_resumed_run_sees_the_same_batches():
    """Whoever starts at step k by skipping k batches gets what a whole run gets, in another process too: the generator
    keeps nothing between runs."""
    whole = order([5, 20])
    for k in (1, 17, 49):
        assert [r.tolist() for r in itertools.islice(data.sample_order([5, 20], 4, 50, 1), k, None)] == whole[k:]


def test_stages_are_cumulative_and_share_the_steps_by_size():
    batches = order([10, 30, 60], batch=10, steps=100)
    assert len(batches) == 100
    largest = [max(rows) for rows in batches]
    assert all(row < 10 for row in largest[:10])
    assert all(row < 30 for row in largest[10:40]) and max(largest[10:40]) >= 10
    assert max(largest[40:]) >= 30 and set(itertools.chain(*batches[40:])) == set(range(60))


@pytest.mark.parametrize("steps", [0, 1, 7, 101])
def test_as_many_batches_as_steps(steps):
    assert len(order([3, 8, 9], steps=steps)) == steps


def test_nested_stages_in_shuffled_order_are_pinned():
    """Fine-tunings of before must stay reproducible."""
    expected = [[0, 2, 1, 0], [6, 3, 1, 0], [2, 4, 7, 5], [0, 6, 1, 7], [4, 3, 2, 5]]
    assert order([3, 8], batch=4, steps=5, seed=7) == expected


def batches(curriculum, batch=16, steps=None, **options) -> list[data.Batch]:
    steps = finetune.num_steps("lite", curriculum, batch, steps, 1, stages=options.get("stages", "nested"))
    return list(data.curriculum_batches(curriculum, batch, steps, 42, **options))


OFFICIAL = {"stages": "increments", "order": "file"}


@pytest.mark.parametrize(("epochs", "steps"), [(1, 313), (3, 939), (10, 3130)])
def test_increments_take_the_official_number_of_steps(epochs, steps):
    """Each stage shows the rows between its borders, `epochs` times, and ends each pass with its own short batch."""
    curriculum = (1000, 3000, 5000)
    assert finetune.num_steps("standard", curriculum, 16, None, epochs, stages="increments") == steps
    made = list(data.curriculum_batches(curriculum, 16, steps, 42, **OFFICIAL))
    expected = [range(0, 1000)] * epochs + [range(1000, 3000)] * epochs + [range(3000, 5000)] * epochs
    assert np.concatenate([one.rows for one in made]).tolist() == list(itertools.chain(*expected))
    passes = np.concatenate([one.passes for one in made])
    assert passes.tolist() == list(itertools.chain(*([i % epochs] * len(rows) for i, rows in enumerate(expected))))
    short = [len(one.rows) for one in made if len(one.rows) != 16]
    assert short == [8] * epochs and [len(one.rows) for one in made[:63]] == [16] * 62 + [8]
    assert all(len(set(one.passes)) == 1 for one in made)


def test_increments_may_be_shuffled():
    made = batches((10, 25), batch=4, steps=14, stages="increments")
    assert [len(one.rows) for one in made] == [4, 4, 2] * 2 + [4, 4, 4, 3] * 2
    stages = [made[:6], made[6:]]
    shown = [
        np.concatenate([one.rows for one in stage if number in one.passes]).tolist()
        for stage in stages
        for number in range(2)
    ]
    assert [sorted(rows) for rows in shown] == [list(range(10))] * 2 + [list(range(10, 25))] * 2
    assert all(rows != sorted(rows) for rows in shown) and shown[0] != shown[1] and shown[2] != shown[3]


@pytest.mark.parametrize("steps", [0, 1, 5, 50])
def test_increments_share_given_steps_by_the_batches_of_a_pass(steps):
    made = batches((8, 24), batch=4, steps=steps, **OFFICIAL)
    first = sum(one.rows.max() < 8 for one in made)
    assert len(made) == steps and first == round(steps / 3)
    assert all(one.rows.min() >= 8 for one in made[first:])


def test_nested_stages_in_file_order():
    made = batches((3, 5), batch=2, steps=8, order="file")
    rows = np.concatenate([one.rows for one in made]).tolist()
    assert rows == [0, 1, 2, 0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("options", [{}, {"order": "file"}, {"stages": "increments"}, OFFICIAL])
def test_a_row_and_a_pass_name_one_showing(options):
    made = batches((5, 11), batch=4, steps=40, **options)
    shown = [pair for one in made for pair in zip(one.rows.tolist(), one.passes.tolist(), strict=True)]
    assert len(set(shown)) == len(shown)
    passes = np.concatenate([one.passes for one in made])
    steps = np.diff(passes)
    assert passes[0] == 0 and set(steps[steps >= 0]) == {0, 1}
    increments = options.get("stages") == "increments"
    assert [int(passes[i + 1]) for i in np.flatnonzero(steps < 0)] == [0] * increments  # at the border of the stages


@pytest.mark.parametrize(("options", "name"), [({"stages": "cumulative"}, "stages"), ({"order": "random"}, "order")])
def test_unknown_kinds_are_refused(options, name):
    with pytest.raises(ValueError, match=f"{name} '{options[name]}' is unknown; expected one of"):
        next(data.curriculum_batches([4], 2, 2, 0, **options))
