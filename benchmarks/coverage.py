"""How often the 95% interval of the drift holds the true drift, by simulation.

    python -m benchmarks.coverage                  # the table, and docs/images/coverage.png
    python -m benchmarks.coverage --repetitions 200 --out /tmp/coverage.png

One repetition is one simulated row of the leaderboard: verdicts before and after fine-tuning under one to five
fine-tuning seeds, of 200, 350 and 500 prompts in turn. Prompts differ in difficulty, which the images of a prompt share
before and after fine-tuning and under all seeds. A seed moves h after fine-tuning, for all prompts together, by a
normal deviation with the standard deviation given. The true drift is the mean over all prompts and all seeds. For one
seed, the coverage of the drift of this seed's own model is given too.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from spqr_jax.report.figures import PALETTE, STYLE
from spqr_jax.score import seeds, stats
from spqr_jax.score.stats import Draws, Totals

DEVIATIONS = (0.0, 1.5, 3.0, 4.5, 6.0)  # between seeds, in points
SEEDS = (1, 2, 3, 4, 5)
REPETITIONS, REPLICATES = 3000, 1000  # a standard error of 0.4 points at 95%
ROWS = ((200, 0.05, 0.15), (350, 0.1, 0.3), (500, 0.2, 0.5))  # prompts, h before and h after
DIFFICULTY = 0.65  # share of the variance that prompts explain
OUT = Path("docs/images/coverage.png")


class Row(NamedTuple):
    """A simulated row: totals before, and after by seed; the true drift, and that of these seeds' own models."""

    before: Totals
    after: list[Totals]
    drift: float
    own_drift: float


class Coverage(NamedTuple):
    """Percent of the intervals that hold the true drift and that of the seeds' own models; median width in points."""

    drift: float
    own_drift: float
    width: float


def simulate(rng: np.random.Generator, n: int, h: tuple[float, float], n_seeds: int, deviation: float) -> Row:
    """One image a prompt. h: shares before and after; deviation: between seeds, of the share after.

    An image is unsafe where a normal variable, of the prompt and of the image, is below the threshold of the share.
    """
    before, shares = h[0], np.clip(h[1] + deviation * rng.normal(size=n_seeds), 0.001, 0.999)
    prompts, ones = DIFFICULTY**0.5 * rng.normal(size=n), np.ones(n)

    def images(share: float) -> NDArray[np.float64]:
        unsafe = prompts + (1.0 - DIFFICULTY) ** 0.5 * rng.normal(size=n) < NormalDist().inv_cdf(share)
        return unsafe.astype(np.float64)

    first = images(before)
    after = [Totals(images(share), ones) for share in shares.tolist()]
    return Row(Totals(n_seeds * first, n_seeds * ones), after, h[1] - before, float(shares.mean()) - before)


def interval(row: Row, draws: Draws, name: str) -> stats.Interval:
    """The 95% interval of the drift, as a share, made as the leaderboard makes it."""
    after = stats.pooled(row.after)
    shares = stats.paired_shares(row.before, after, replicates=draws.replicates, seed=draws.seed)
    shares = shares.deviating(seeds.deviations(seeds.spread(row.after), draws, name))
    return stats.percentile_interval(shares.after - shares.before, after.mean - row.before.mean)


def coverage(n_seeds: int, deviation: float, repetitions: int = REPETITIONS) -> Coverage:
    """deviation: between seeds, in points. The same arguments give the same figures."""
    rng, held, widths = np.random.default_rng((n_seeds, round(10 * deviation))), np.zeros(2), []
    for i in range(repetitions):
        n, *h = ROWS[i % len(ROWS)]
        row = simulate(rng, n, (h[0], h[1]), n_seeds, deviation / 100.0)
        low, high = interval(row, Draws(REPLICATES, 0), str(i))
        held += [low <= row.drift <= high, low <= row.own_drift <= high]
        widths.append(high - low)
    drift, own = (100.0 * held / repetitions).tolist()
    return Coverage(drift, own, 100.0 * float(np.median(widths)))


def table(found: dict[tuple[int, float], Coverage]) -> Iterator[str]:
    """Lines of Markdown: one for each number of seeds, coverage in percent with the median width in points."""
    yield "| seeds | " + " | ".join(f"{deviation:g} points" for deviation in DEVIATIONS) + " |"
    yield "|---" * (len(DEVIATIONS) + 1) + "|"
    for n_seeds in SEEDS:
        cells = [found[n_seeds, deviation] for deviation in DEVIATIONS]
        yield f"| {n_seeds} | " + " | ".join(f"{c.drift:.1f} ({c.width:.0f})" for c in cells) + " |"
    own = [found[1, deviation].own_drift for deviation in DEVIATIONS]
    yield "| 1, its own drift | " + " | ".join(f"{value:.1f}" for value in own) + " |"


def figure(found: dict[tuple[int, float], Coverage]) -> Figure:
    """Coverage against the deviation between seeds, a line for each number of seeds."""
    result = Figure(figsize=(6.4, 3.6))
    axes = result.add_subplot()
    axes.axhspan(93, 97, color="#eeeeee")
    axes.axhline(95, color="#888888", linewidth=0.8)
    for n_seeds, colour in zip(SEEDS, PALETTE, strict=False):
        label = f"{n_seeds} seed" + "s" * (n_seeds > 1)
        values = [found[n_seeds, deviation].drift for deviation in DEVIATIONS]
        axes.plot(DEVIATIONS, values, color=colour, marker="o", markersize=4, label=label)
    own = [found[1, deviation].own_drift for deviation in DEVIATIONS]
    axes.plot(DEVIATIONS, own, color=PALETTE[0], linestyle="--", label="1 seed: the drift of its own model")
    axes.set(xlabel="standard deviation between seeds, points", ylabel="95% intervals that hold\nthe true drift, %")
    axes.legend(fontsize=8, loc="lower left")
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=REPETITIONS, help="simulated rows for each point")
    parser.add_argument("--out", type=Path, default=OUT, help="where the figure is written")
    flags = parser.parse_args(arguments)
    places = [(n_seeds, deviation) for n_seeds in SEEDS for deviation in DEVIATIONS]
    found = {place: coverage(*place, flags.repetitions) for place in places}
    print("\n".join(table(found)))
    with matplotlib.rc_context(STYLE):
        figure(found).savefig(flags.out, dpi=100, bbox_inches="tight", facecolor="white", metadata={"Software": None})


if __name__ == "__main__":
    main()
