"""Drawing samples from a source. Every drawn image is decoded before anything is trained."""

import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
from absl import logging

from spqr_jax.data import pictures
from spqr_jax.data.dataset import Dataset
from spqr_jax.data.pictures import Preprocess
from spqr_jax.data.source import Source

LOOK_CHUNK = 512
T = TypeVar("T")


class Look(NamedTuple):
    """One row after a look at it: hash of the image's bytes, width and height in pixels, and its fault ("" if none)."""

    row: int
    digest: str
    width: int
    height: int
    problem: str


def look(source: Source, rows: Sequence[int] | np.ndarray) -> Iterator[Look]:
    """Reads and decodes the images of some rows, several at a time. One Look a row, in the order of `rows`."""
    for start in range(0, len(rows), LOOK_CHUNK):
        chunk = [int(row) for row in rows[start : start + LOOK_CHUNK]]
        source.prefetch(chunk)
        yield from in_threads(lambda row: _look(source, row), chunk)


def in_threads(work: Callable[[int], T], rows: Sequence[int]) -> list[T]:
    """`work` of every row, in order, in threads: Pillow decodes and resizes without holding Python's lock."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(work, rows))


def _look(source: Source, row: int) -> Look:
    try:
        content = source.read(row)
    except OSError as error:
        return Look(row, "", 0, 0, f"cannot be read ({error.strerror or error})")
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    try:
        width, height = pictures.measure(content)
    except ValueError as error:
        return Look(row, digest, 0, 0, str(error))
    return Look(row, digest, width, height, "" if source.captions[row] else "the caption is empty")


def order(source: Source, seed: int) -> np.ndarray:
    """Every row once, shuffled by `seed`: int [len(source)].

    The parts of a mixture are shuffled each by itself, and take turns until the shorter ones end.
    """
    parts = source.parts or (len(source),)
    rng = np.random.default_rng(seed)
    shuffled = [rng.permutation(size) for size in parts]
    starts = np.cumsum([0, *parts[:-1]])
    return in_turn(source, np.concatenate([start + rows for start, rows in zip(starts, shuffled, strict=True)]))


def in_turn(source: Source, rows: np.ndarray) -> np.ndarray:
    """Rows, grouped by the parts of a mixture, in an order in which the parts take turns until the shorter ones end."""
    part = np.searchsorted(np.cumsum(source.parts), rows, side="right")
    rank = np.arange(len(rows)) - np.searchsorted(part, part)
    return rows[np.argsort(rank, kind="stable")]


def in_file_order(source: Source, drawn: Sequence[Look]) -> list[Look]:
    """Drawn rows in the order of the file. The parts of a mixture keep each their own order, and take turns."""
    of_row = {found.row: found for found in drawn}
    return [of_row[row] for row in in_turn(source, np.array(sorted(of_row)))]


def draw(source: Source, n: int, *, seed: int, max_bad: int) -> list[Look]:
    """The first `n` good rows in the order of `seed`. Bad rows are logged and skipped.

    Raises ValueError if more than `max_bad` rows are bad, naming them, or if there are fewer than `n` good rows.
    """
    good: list[Look] = []
    bad: list[Look] = []
    rows, at = order(source, seed), 0
    while len(good) < n and at < len(rows):
        chunk = rows[at : at + n - len(good)]
        at += len(chunk)
        for found in look(source, chunk):
            (bad if found.problem else good).append(found)
            if len(bad) > max_bad:
                listed = "; ".join(f"{source.where[b.row]}: {b.problem}" for b in bad[:10])
                raise ValueError(f"{source.name}: more than bft.max_bad={max_bad} bad samples: {listed}.")
    for found in bad:
        logging.warning("%s: skipped %s: %s.", source.name, source.where[found.row], found.problem)
    if len(good) < n:
        raise ValueError(
            f"{source.name} has {len(good)} good samples, bft.samples asks for {n}; lower bft.samples and "
            "bft.curriculum, or add data."
        )
    return good


def dataset(source: Source, drawn: Sequence[Look], how: Preprocess) -> Dataset:
    """The drawn rows as training data of the pass `how.epoch`.

    Its name ends in a hash of all that training sees: bytes of the images, captions, order, preprocessing. So the same
    files in another place have the same name, and a changed file changes it. It names the reader too, if that is a
    plug-in.
    """
    captions = tuple(source.captions[found.row] for found in drawn)

    def one(i: int) -> np.ndarray:
        row = drawn[i].row
        try:
            return pictures.prepare(pictures.decode(source.read(row)), how, row)
        except (OSError, ValueError) as error:
            raise ValueError(f"{source.where[row]}: {error}; it was readable when the run started.") from None

    def images(rows: np.ndarray) -> np.ndarray:
        return np.stack(in_threads(one, [int(row) for row in rows]))

    def geometry(rows: np.ndarray) -> np.ndarray:
        found = (drawn[int(row)] for row in rows)
        return np.array([pictures.geometry(f.width, f.height, how, f.row) for f in found], np.int32).reshape(-1, 4)

    content = hashlib.sha256(repr((tuple(how), [found.digest for found in drawn], captions)).encode()).hexdigest()
    kind = source.name.partition(":")[0]
    name = f"{kind} {len(drawn)} at {how.side} px {content[:16]}"
    if source.plugin:
        name += f" read by {source.plugin}"
    return Dataset(captions, images, name, geometry, _other_passes(source, drawn, how))


def _other_passes(source: Source, drawn: Sequence[Look], how: Preprocess) -> Callable[[int], Dataset] | None:
    """`Dataset.at_pass`: None where no image is mirrored, and each is square or cropped at its centre."""
    if not any(pictures.varies(found.width, found.height, how) for found in drawn):
        return None
    return functools.lru_cache(maxsize=8)(lambda number: dataset(source, drawn, how._replace(epoch=number)))
