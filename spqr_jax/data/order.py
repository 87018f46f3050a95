"""The samples that each training step sees, as given by a seed, a curriculum, and the passes over its stages."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

STAGES, ORDERS = ("nested", "increments"), ("shuffled", "file")


class Batch(NamedTuple):
    """The samples of one step.

    Attributes:
        rows: their numbers in the data set, int [b].
        passes: for each, the number of the pass that shows it, int [b], from 0. Nested stages count on where the stage
            before ended. Increments begin at 0 each, since they share no rows, so that fewer passes are a part of more.
            A row and a pass together name one showing of one sample.
    """

    rows: np.ndarray
    passes: np.ndarray


def curriculum_stages(size: int, curriculum: Sequence[int]) -> list[int]:
    """The cumulative sizes of the stages: those of `curriculum`, or `size` alone without one.

    Paper, section B: models are "progressively exposed to increasing amounts of data" (1000, 3000, 5000 samples).
    Raises ValueError for an empty data set, and for a curriculum that does not increase or is larger than the data.
    """
    if size == 0:
        raise ValueError("the fine-tuning data set is empty.")
    sizes = list(curriculum) or [size]
    if sorted(set(sizes)) != sizes or sizes[0] < 1:
        raise ValueError(f"curriculum must be increasing positive sizes, found {sizes}.")
    if sizes[-1] > size:
        raise ValueError(f"curriculum asks for {sizes[-1]} samples, the data set has {size}; shorten it or add data.")
    return sizes


def stage_rows(curriculum: Sequence[int], stages: str = "nested") -> list[range]:
    """The rows of each stage: all up to its border ("nested"), or those between two borders ("increments").

    Raises ValueError for other kinds of stages.
    """
    _check("stages", stages, STAGES)
    starts = [0] * len(curriculum) if stages == "nested" else [0, *curriculum[:-1]]
    return [range(start, end) for start, end in zip(starts, curriculum, strict=True)]


def curriculum_batches(
    curriculum: Sequence[int], batch: int, steps: int, seed: int, *, stages: str = "nested", order: str = "shuffled"
) -> Iterator[Batch]:
    """The samples of each of `steps` steps.

    curriculum: cumulative sizes of the stages. order: "shuffled", where every pass over a stage is a new permutation
    drawn from (seed, stage, pass); or "file", the order of the data set in every pass.

    "nested" stages share the steps in proportion to their sizes, and all batches are full: one may hold the end of a
    pass and the beginning of the next. "increments" share the steps in proportion to the batches of one pass, and every
    pass ends with a batch of its own, which may be short. So the samples depend neither on devices nor on the step at
    which a run was resumed. Raises ValueError for unknown `stages` or `order`.
    """
    _check("order", order, ORDERS)
    ranges, cut = stage_rows(curriculum, stages), _joined if stages == "nested" else _apart
    shares = [len(rows) if stages == "nested" else -(-len(rows) // batch) for rows in ranges]
    borders = np.rint(np.cumsum(shares) / np.sum(shares) * steps).astype(int)
    first = 0
    for stage, (rows, count) in enumerate(zip(ranges, np.diff(borders, prepend=0), strict=True)):
        begun = 0
        for one in itertools.islice(cut(_passes(rows, (seed, stage), order), batch), int(count)):
            yield Batch(one.rows, first + one.passes)
            begun = int(one.passes[-1]) + 1
        first += begun if stages == "nested" else 0


def sample_order(sizes: Sequence[int], batch: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """The row numbers, int [batch], of each of `steps` batches, from nested stages of these sizes in shuffled order."""
    return (one.rows for one in curriculum_batches(sizes, batch, steps, seed))


def _passes(rows: range, seed: tuple[int, int], order: str) -> Iterator[np.ndarray]:
    """The rows of a stage as each of its passes shows them, without end."""
    for number in itertools.count():
        own = np.arange(len(rows)) if order == "file" else np.random.default_rng((*seed, number)).permutation(len(rows))
        yield rows.start + own


def _joined(passes: Iterator[np.ndarray], batch: int) -> Iterator[Batch]:
    """Full batches of one pass after the other."""
    rest = Batch(np.zeros(0, int), np.zeros(0, int))
    for number, rows in enumerate(passes):
        rest = Batch(np.concatenate([rest.rows, rows]), np.concatenate([rest.passes, np.full(len(rows), number)]))
        while len(rest.rows) >= batch:
            yield Batch(rest.rows[:batch], rest.passes[:batch])
            rest = Batch(rest.rows[batch:], rest.passes[batch:])


def _apart(passes: Iterator[np.ndarray], batch: int) -> Iterator[Batch]:
    """The batches of every pass by itself."""
    for number, rows in enumerate(passes):
        for start in range(0, len(rows), batch):
            chosen = rows[start : start + batch]
            yield Batch(chosen, np.full(len(chosen), number))


def _check(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} {value!r} is unknown; expected one of {', '.join(known)}.")
