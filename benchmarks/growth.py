"""Seconds and memory as a run grows: against pictures, cells, prompts and the submissions of a board.

    python -m benchmarks.growth --out runs/growth                            # everything, one table and one figure
    python -m benchmarks.growth --out runs/growth --curves "cells scored" --most 36
    python -m benchmarks.growth --out runs/growth --table                    # what is measured already

- pictures generated: the emoji world's model makes pictures in one denoising step each, and its judges judge them;
- cells scored, cells reported: sweeps of 1,000 prompts, three profiles and four scenarios, a subject for twelve cells;
- prompts scored: 300 cells, of so many prompts each;
- prompts reported: two subjects under one profile, every prompt with its pictures in the gallery;
- submissions verified, submissions known: a board that verifies every bundle, and the same board again from its cache.

Every point is measured in a process of its own, after another one has invented the run. Seconds are those of the
processor, of all threads, since a machine that others use changes them less than those of the clock. Memory is the
highest resident memory of the process, with what it imports. The exponent of a curve is the slope of the line through
the logarithms of its points, over the last decade of sizes: 1 is linear. What is measured is kept in the directory, so
a run that was stopped continues.
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from benchmarks import side_by_side
from benchmarks.side_by_side import Prepared, Side, Timed, Worker

FIGURE = Path("docs/images/growth.png")
ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
PROMPTS, CELLS, FROM_TWO = 1000, 300, 2  # of the curves in which something else grows
DECADE = 10.0


class Curve(NamedTuple):
    """One curve: what grows, its sizes, and the work on a folder that `invent` filled for a size."""

    grows: str
    done: str
    sizes: tuple[int, ...]
    material: str  # curves with the same material share the folders
    invent: Callable[[Path, int], None]
    work: Callable[[Path, int], None]

    @property
    def name(self) -> str:
        """As --curves takes it."""
        return f"{self.grows} {self.done}"


class Point(NamedTuple):
    """Processor seconds, seconds of the clock, and GiB of a size."""

    seconds: float
    clock: float
    memory: float


# The work


def nothing(folder: Path, size: int) -> None:
    """No material."""


def generate(folder: Path, size: int) -> None:
    """Half of the pictures are of harmful prompts: 50 prompts, or as many as there are pictures."""
    from benchmarks import cell
    from spqr_jax.devices import mesh
    from spqr_jax.run import opening, stages
    from spqr_jax.run.manifest import write_manifest

    config = cell.settings(min(50, size // 2), "standard")
    config.prompts.images, config.generation.steps = max(1, size // 100), 1
    mesh.split_cpu(config.mesh.cpu_devices)
    state = opening.open_run(config, folder / "run")
    write_manifest(state, ["benchmarks/growth.py"])
    if failures := stages.carry_out(state, {"align", "generate", "judge"}):
        raise RuntimeError(failures[0].error)


def sweep(folder: Path, size: int) -> None:
    """A scored sweep of so many cells."""
    from benchmarks import invented_runs

    score(invented_runs.write(folder, cells=size, prompts=PROMPTS), size)


def large_sweep(folder: Path, size: int) -> None:
    """A sweep of CELLS cells of so many prompts."""
    from benchmarks import invented_runs

    invented_runs.write(folder, cells=CELLS, prompts=size)


def pictured(folder: Path, size: int) -> None:
    """Two scored subjects under one profile, with their pictures."""
    from benchmarks import invented_runs

    score(invented_runs.write(folder, cells=FROM_TWO, prompts=size, each=1, pictures=True), size)


def bundles(folder: Path, size: int) -> None:
    """Bundles of two rows and twenty prompts each."""
    from tests.board import bundles

    for i in range(size):
        bundles.bundle(folder, f"s{i:03}", ("No alignment", f"Method {i}"), draw=i)
        shutil.rmtree(folder / "runs")


def score(folder: Path, size: int) -> None:
    """As `python -m spqr_jax.score` does."""
    from spqr_jax.score import leaderboard

    leaderboard.write(folder, leaderboard.build(folder))


def report(folder: Path, size: int) -> None:
    """As `python -m spqr_jax.report` does."""
    from spqr_jax import report

    report.write(folder)


def report_all(folder: Path, size: int) -> None:
    """As `python -m spqr_jax.report --prompts SIZE` does."""
    from spqr_jax import report

    report.write(folder, prompts=size)


def board(folder: Path, size: int) -> None:
    """As `python -m spqr_jax.report board` does without a cache, and then with what it left."""
    from spqr_jax.board import site

    found = site.write([folder / "bundles"], folder / "site", cache=folder / "cache")
    if len(found.submissions) != size:
        raise RuntimeError(f"{len(found.submissions)} submissions of {size} are verified")


def new_board(folder: Path, size: int) -> None:
    """A board of which nothing is known."""
    shutil.rmtree(folder / "cache", ignore_errors=True)
    board(folder, size)


def known_bundles(folder: Path, size: int) -> None:
    """Bundles, and a board of them."""
    if not (folder / "bundles").exists():
        bundles(folder, size)
    if not (folder / "cache").exists():
        board(folder, size)


GROWING = (1, 3, 12, 36, 108, 300)
TO_10_000 = (200, 1000, 3000, 10_000)
MANY = (1, 5, 50, 150, 500)
CURVES = (
    Curve("pictures", "generated", (100, 300, 1000, 3000, 10_000), "pictures", nothing, generate),
    Curve("cells", "scored", GROWING, "sweep", sweep, score),
    Curve("cells", "reported", GROWING, "sweep", sweep, report),
    Curve("prompts", "scored", TO_10_000, "large sweep", large_sweep, score),
    Curve("prompts", "reported", TO_10_000, "pictured", pictured, report_all),
    Curve("submissions", "verified", MANY, "bundles", bundles, new_board),
    Curve("submissions", "known", MANY, "bundles", known_bundles, board),
)


# Measuring


def prepared(curve: str, folder: Path, size: int) -> Prepared:
    """The tasks of one point, in a process of its own."""
    own = next(c for c in CURVES if c.name == curve)
    return Prepared({"invent": lambda: own.invent(folder, size), "work": lambda: timed(own, folder, size)}, {})


def timed(curve: Curve, folder: Path, size: int) -> Timed:
    """The seconds of the clock, and as value those of the processor, of this process and of its children."""
    start, before = time.perf_counter(), os.times()
    curve.work(folder, size)
    after = os.times()
    return Timed(time.perf_counter() - start, sum(after[:4]) - sum(before[:4]))


def measure(curve: Curve, size: int, scratch: Path) -> Point:
    """One point. What it worked on stays for other curves."""
    folder = scratch / f"{curve.material}-{size}".replace(" ", "-")
    if not (folder / "invented").exists() or curve.invent is known_bundles:
        if curve.invent is not known_bundles:
            shutil.rmtree(folder, ignore_errors=True)
        inventor = Worker(Side(prepared, (curve.name, folder, size), ONE_THREAD))
        inventor.run("invent")
        inventor.close()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "invented").touch()
    worker = Worker(Side(prepared, (curve.name, folder, size), ONE_THREAD))
    found = worker.run("work")
    return Point(found.value, found.seconds, worker.close())


def fill(out: Path, curves: Sequence[Curve], most: int) -> None:
    """Measure every point that the directory lacks."""
    scratch = out / "invented"
    for curve in curves:
        for size in (size for size in curve.sizes if size <= most):
            points = read(out)
            if size not in points.get(curve.name, {}):
                points.setdefault(curve.name, {})[size] = measure(curve, size, scratch)
                write(out, points)
                side_by_side.progress(f"{curve.name}, {size}: {points[curve.name][size]}")
    shutil.rmtree(scratch, ignore_errors=True)


Points = dict[str, dict[int, Point]]


def read(out: Path) -> Points:
    """The points of a directory, by the name of their curve and by size."""
    file = out / "points.json"
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return {name: {int(size): Point(*point) for size, point in own.items()} for name, own in kept.items()}


def write(out: Path, points: Points) -> None:
    """Keep points, in a file that is complete or the older one."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "points.json.partial").write_text(json.dumps(points, indent=1), encoding="utf-8")
    os.replace(out / "points.json.partial", out / "points.json")


# Showing


def exponent(values: dict[int, float]) -> float | None:
    """The slope of the line through the logarithms of a curve's last decade; None for fewer than two points there."""
    sizes = [size for size in values if size * DECADE >= max(values)]
    if len(sizes) < 2:
        return None
    return float(np.polyfit(np.log(sizes), np.log([max(values[size], 1e-9) for size in sizes]), 1)[0])


def exponents(points: dict[int, Point]) -> tuple[float | None, float | None]:
    """Of the seconds and of the memory."""
    seconds = exponent({size: point.seconds for size, point in points.items()})
    return seconds, exponent({size: point.memory for size, point in points.items()})


def table(points: Points) -> list[dict[str, Any]]:
    """A row for each curve: its points in the order of their sizes, and the exponents."""
    rows = []
    for curve in (curve for curve in CURVES if curve.name in points):
        own = dict(sorted(points[curve.name].items()))
        row: dict[str, Any] = {"": curve.name, "sizes": ", ".join(map(str, own))}
        names = zip(("processor seconds", "clock", "peak GiB"), Point._fields, strict=True)
        row |= {shown: ", ".join(_short(getattr(point, name)) for point in own.values()) for shown, name in names}
        slopes = ("" if slope is None else f"{slope:.2f}" for slope in exponents(own))
        rows.append(row | dict(zip(("exponent of seconds", "of GiB"), slopes, strict=True)))
    return rows


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}"


def figure(points: Points) -> Figure:
    """Seconds above, memory below; a column for each thing that grows. The dashed line is linear."""
    from spqr_jax.report.figures import PALETTE

    columns = list(dict.fromkeys(curve.grows for curve in CURVES if curve.name in points))
    result = Figure(figsize=(3.4 * len(columns), 6.2))
    panels = result.subplots(2, len(columns), squeeze=False, sharex="col", sharey="row")
    for column, grows in enumerate(columns):
        own = [curve for curve in CURVES if curve.grows == grows and curve.name in points]
        for row, unit in enumerate(("processor seconds", "peak memory, GiB")):
            axes = panels[row][column]
            for curve, colour in zip(own, PALETTE, strict=False):
                known = dict(sorted(points[curve.name].items()))
                slope, values = exponents(known)[row], [point[(0, 2)[row]] for point in known.values()]
                label = curve.done + ("" if slope is None else f": {slope:.2f}")
                axes.loglog(list(known), values, color=colour, marker="o", markersize=4, label=label)
                if row == 0:  # memory begins with what the process imports
                    last = [size for size in known if size * DECADE >= max(known)]
                    line = [values[-1] * size / max(known) for size in last]
                    axes.loglog(last, line, color=colour, linestyle="--", linewidth=0.8)
            axes.legend(fontsize=8)
            axes.set_ylabel(unit if column == 0 else "")
        panels[1][column].set(xlabel=grows, ylim=(0.1, None))
        for axis in (panels[0][column].yaxis, panels[1][column].yaxis, panels[1][column].xaxis):
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.set_minor_formatter(NullFormatter())
    result.tight_layout()
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory of the points")
    parser.add_argument("--curves", default=",".join(c.name for c in CURVES), help="comma-separated; default: all")
    parser.add_argument("--most", type=int, default=max(TO_10_000), help="the largest size that is measured")
    parser.add_argument("--figure", type=Path, default=FIGURE, help="where the figure is written")
    parser.add_argument("--table", action="store_true", help="show what is there and measure nothing")
    flags = parser.parse_args(arguments)
    known, names = {curve.name: curve for curve in CURVES}, flags.curves.split(",")
    if unknown := [name for name in names if name not in known]:
        parser.error(f"--curves has {unknown[0]!r}; expected some of {', '.join(known)}")
    if not flags.table:
        fill(flags.out, [known[name] for name in names], flags.most)
    if not (points := read(flags.out)):
        parser.error(f"--out {flags.out}: no point is there; leave out --table")
    import matplotlib

    from spqr_jax.report.figures import STYLE

    with matplotlib.rc_context(STYLE):
        figure(points).savefig(flags.figure, dpi=100, facecolor="white", metadata={"Software": None})
    print(f"{side_by_side.machine()}\n\n{side_by_side.markdown(table(points))}")


if __name__ == "__main__":
    main()
