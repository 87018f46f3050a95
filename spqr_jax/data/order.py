"""The samples that each training step sees, as given by a seed, an epoch and a curriculum."""

from collections.abc import Iterator, Sequence

import numpy as np


def curriculum_stages(size: int, curriculum: Sequence[int]) -> list[int]:
    """The number of samples that each stage draws from: those of `curriculum`, or `size` alone without one.

    Paper, section B: models are "progressively exposed to increasing amounts of data" (1000, 3000, 5000 samples).
    Raises ValueError for an empty data set, and for a curriculum that does not increase or is larger than the data.
    """
    if size == 0:
        raise ValueError("the fine-tuning data set is empty.")
    stages = list(curriculum) or [size]
    if sorted(set(stages)) != stages or stages[0] < 1:
        raise ValueError(f"curriculum must be increasing positive sizes, found {stages}.")
    if stages[-1] > size:
        raise ValueError(f"curriculum asks for {stages[-1]} samples, the data set has {size}; shorten it or add data.")
    return stages


def sample_order(stages: Sequence[int], batch: int, steps: int, seed: int) -> Iterator[np.ndarray]:
    """The row numbers, int [batch], of each of `steps` batches.

    Stages share the steps in proportion to their sizes. Within a stage every epoch is a new permutation drawn from
    (seed, stage, epoch). So the order depends neither on devices nor on the step at which a run was resumed.
    """
    borders = np.rint(np.cumsum(stages) / np.sum(stages) * steps).astype(int)
    done = 0
    for stage, (size, border) in enumerate(zip(stages, borders, strict=True)):
        rows, epoch = np.zeros(0, int), 0
        for _ in range(done, border):
            while len(rows) < batch:
                rows = np.concatenate([rows, np.random.default_rng((seed, stage, epoch)).permutation(size)])
                epoch += 1
            yield rows[:batch]
            rows = rows[batch:]
        done = border
