"""Latents of a data set: encoded in batches that fit, and pass by pass where crops change."""

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

import convert
from spqr_jax import data
from spqr_jax.devices import processes
from spqr_jax.training import latents


def test_large_pictures_are_encoded_few_at_a_time_to_the_same_latents(reference, monkeypatch):
    pipeline = convert.load(reference("sd1")[1])
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
    dataset = data.from_arrays(images, ["a cat"] * 5)
    whole = latents.encode(pipeline, dataset)
    seen = []
    encode = latents.encode_batch
    monkeypatch.setattr(latents, "encode_batch", lambda *args: seen.append(len(args[3])) or encode(*args))
    monkeypatch.setattr(latents, "ENCODE_PIXELS", 2 * 16 * 16)
    parts = latents.encode(pipeline, dataset)
    assert seen == [2, 2, 2] and parts.mean.shape == (5, 8, 8, 4)  # the last one padded
    np.testing.assert_allclose(parts.mean, whole.mean, atol=1e-5)
    np.testing.assert_allclose(parts.logvar, whole.logvar, atol=1e-5)


ROWS = 22


class Changing:
    """A data set of noise that differs from pass to pass, and what was asked of it."""

    def __init__(self):
        self.asked: set[tuple[int, int]] = set()

    def dataset(self, number: int = 0) -> data.Dataset:
        def images(rows):
            self.asked |= {(number, int(row)) for row in rows}
            return picture(number, rows)

        return data.Dataset(("a cat",) * ROWS, images, f"noise {number}", at_pass=self.dataset)


def picture(number: int, rows) -> np.ndarray:
    return np.stack([np.random.default_rng((number, row)).integers(0, 256, (16, 16, 3), np.uint8) for row in rows])


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 8 rows, encoded 4 at a time; the last block has 6 rows."""
    monkeypatch.setattr(latents, "ENCODE_BATCH", 4)
    monkeypatch.setattr(latents, "BLOCK_ROWS", 9)


@pytest.fixture(scope="module")
def pipeline(reference):
    return convert.load(reference("sd1")[1])


def batches(passes: int = 3) -> list[data.Batch]:
    """Every row once a pass, shuffled; batches of 4 run over the ends of passes."""
    order = [np.random.default_rng(number).permutation(ROWS) for number in range(passes)]
    rows, numbers = np.concatenate(order), np.repeat(np.arange(passes), ROWS)
    return [data.Batch(rows[i : i + 4], numbers[i : i + 4]) for i in range(0, len(rows), 4)]


def same(a, b) -> bool:
    return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


def all_batches(encoded: latents.Encoded, first: int = 0) -> list[latents.Latents]:
    return [encoded.batch(step) for step in range(first, len(batches()))]


@pytest.mark.usefixtures("small_blocks")
def test_a_batch_has_the_latents_of_its_rows_in_their_passes(reference, pipeline):
    """Those of diffusers' VAE."""
    encoded = latents.Encoded(pipeline, Changing().dataset(), batches())
    assert encoded.size == (16, 16)
    for (rows, passes), made in zip(batches(), all_batches(encoded), strict=True):
        images = np.concatenate([picture(number, [row]) for row, number in zip(rows, passes, strict=True)])
        with torch.no_grad():
            pixels = torch.tensor(images).permute(0, 3, 1, 2) / 127.5 - 1
            theirs = reference("sd1")[0].vae.encode(pixels).latent_dist
        for ours, expected in zip(made, (theirs.mean, theirs.logvar), strict=True):
            np.testing.assert_allclose(ours, expected.permute(0, 2, 3, 1).numpy(), atol=2e-5)


@pytest.mark.usefixtures("small_blocks")
def test_encoded_now_read_or_resumed_the_bits_are_the_same(pipeline, tmp_path, monkeypatch):
    def encoded(dataset=None, **options):
        return latents.Encoded(pipeline, dataset or Changing().dataset(), batches(), **options)

    whole = all_batches(encoded())
    assert all(map(same, all_batches(encoded(cache=tmp_path)), whole))
    assert all(map(same, all_batches(encoded(), first=7), whole[7:]))
    monkeypatch.setattr(latents, "encode_batch", lambda *_: pytest.fail("encoded again"))
    assert all(map(same, all_batches(encoded(cache=tmp_path)), whole))
    assert len(list(tmp_path.iterdir())) == 3 * 3
    renamed = dataclasses.replace(Changing().dataset(), name="others")
    with pytest.raises(pytest.fail.Exception):
        encoded(renamed, cache=tmp_path).batch(0)


def in_file_order(*stages: tuple[int, range]) -> list[data.Batch]:
    """Batches of 2 of each (number of a pass, rows), in the order of the file."""
    return [
        data.Batch(np.arange(start, start + 2), np.full(2, number)) for number, rows in stages for start in rows[::2]
    ]


@pytest.mark.usefixtures("small_blocks")
def test_only_the_blocks_of_rows_that_are_asked_for_are_encoded(pipeline):
    """Two stages of a curriculum: rows 0 to 7 in two passes, then rows 8 to 21 in one."""
    source, stages = Changing(), [(0, range(8)), (1, range(8)), (0, range(8, 22))]
    encoded = latents.Encoded(pipeline, source.dataset(), in_file_order(*stages))
    source.asked.clear()
    for step, (rows, passes) in enumerate(in_file_order(*stages)):
        encoded.batch(step)
        assert source.asked >= set(zip(passes.tolist(), rows.tolist(), strict=True))
        assert len(source.asked) < 8 * (step // 4 + 2)  # one block at a time
    assert source.asked == {(0, row) for row in range(22)} | {(1, row) for row in range(8)}


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("order", [batches(), in_file_order((0, range(6)), (1, range(6)), (0, range(6, 22)))])
def test_a_block_is_encoded_once_and_dropped_after_its_last_use(pipeline, monkeypatch, order):
    counted = []
    encode = latents.encode_batch
    monkeypatch.setattr(latents, "encode_batch", lambda *args: counted.append(1) or encode(*args))
    encoded = latents.Encoded(pipeline, Changing().dataset(), order)
    places = [set(zip(passes.tolist(), (rows // 8).tolist(), strict=True)) for rows, passes in order]
    for step in range(len(order)):
        encoded.batch(step)
        assert set(encoded._blocks) == set().union(*places[: step + 1]) & set().union(*places[step + 1 :])
    assert len(counted) == 2 * len(set().union(*places))  # a block has 8 or 6 rows in batches of 4


@pytest.mark.usefixtures("small_blocks")
def test_passes_that_never_change_are_encoded_once_under_the_old_name(pipeline, tmp_path, monkeypatch):
    dataset = data.from_arrays(picture(0, range(ROWS)), ["a cat"] * ROWS)
    whole = latents.encode(pipeline, dataset, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    monkeypatch.setattr(latents, "encode_batch", lambda *_: pytest.fail("encoded again"))
    encoded = latents.Encoded(pipeline, dataset, batches(), cache=tmp_path)
    for (rows, _), made in zip(batches(), all_batches(encoded), strict=True):
        assert same(made, whole.rows(rows))
    assert list(tmp_path.iterdir()) == [file]


def test_only_the_first_process_writes(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "first", lambda: False)
    made = latents.Encoded(pipeline, Changing().dataset(), batches(), cache=tmp_path).batch(0)
    assert made.mean.shape == (4, 8, 8, 4) and not list(tmp_path.iterdir())


def test_images_that_the_vae_cannot_take_are_refused_before_any_is_encoded(pipeline, monkeypatch):
    monkeypatch.setattr(latents, "encode_batch", lambda *_: pytest.fail("encoded first"))
    odd = data.Dataset(("a",), lambda rows: np.zeros((len(rows), 15, 16, 3), np.uint8), "odd", at_pass=lambda _: odd)
    with pytest.raises(ValueError, match="odd: images are 15x16"):
        latents.Encoded(pipeline, odd, batches())
