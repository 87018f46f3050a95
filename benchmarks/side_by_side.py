"""Two or more sides doing the same tasks in turn on one machine, each in a process of its own.

A side's imports, weights, threads and peak memory are then its alone, and while one works the others wait. Turns
alternate and their order rotates, so that a machine that slows down or speeds up does so for all of them; what is
quoted is the median, and the median of the ratios taken turn by turn.
"""

import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from spqr_jax.devices import huge_pages

LOAD = os.getloadavg()[0]
STARTS = ("; no cache", "; cache filled")
PACKAGES = ("jax", "torch", "diffusers", "transformers", "peft", "onnxruntime")


class Side(NamedTuple):
    """`prepare(*args)` -> Prepared, called in the side's process; both must be importable and picklable."""

    prepare: Callable[..., "Prepared"]
    args: tuple[Any, ...] = ()
    environment: Mapping[str, str] = {}


class Prepared(NamedTuple):
    """Tasks by name, each called without arguments, and how long getting ready took, by name, in seconds.

    A task returns what it made, small and picklable, or Timed to say itself how long it took.
    """

    tasks: dict[str, Callable[[], Any]]
    seconds: dict[str, float]


class Timed(NamedTuple):
    """A result whose time the task has taken itself, in seconds."""

    seconds: float
    value: Any = None


class Started(NamedTuple):
    """One start of a side: seconds of getting ready, and seconds and result of each task's first call."""

    prepare: dict[str, float]
    first: dict[str, float]
    values: dict[str, Any]


class Measured(NamedTuple):
    """What a race found. Keys: side, then task.

    seconds: one a turn, without first calls. starts: the first with empty caches, the second with what the first has
    left. peak: GiB of resident memory, at most.
    """

    seconds: dict[str, dict[str, list[float]]]
    starts: dict[str, list[Started]]
    peak: dict[str, float]

    @property
    def values(self) -> dict[str, dict[str, Any]]:
        """What the first calls returned."""
        return {name: starts[0].values for name, starts in self.starts.items()}


def our_environment(cache: Path, device: str = "cpu") -> dict[str, str]:
    """The environment of our side: huge pages, as launch.py asks for them, and every program kept in `cache`.

    So the second start shows what a filled cache saves.
    """
    return {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PLATFORMS": "cpu" if device == "cpu" else "",
        **huge_pages.setting(os.environ),
    }


class Worker:
    """A side's process, from its start to `close`."""

    def __init__(self, side: Side):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        before = {name: os.environ.get(name) for name in side.environment}
        os.environ.update(side.environment)
        self._process = context.Process(target=_serve, args=(theirs, side.prepare, side.args))
        self._process.start()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        theirs.close()
        self.prepare: dict[str, float] = self._answer()
        self.first: dict[str, float] = {}

    def run(self, task: str) -> Timed:
        self._pipe.send(task)
        result = Timed(*self._answer())
        self.first.setdefault(task, result.seconds)
        return result

    def close(self) -> float:
        """Ends the process; its peak memory in GiB."""
        self._pipe.send(None)
        peak = self._answer()
        self._process.join()
        return peak

    def _answer(self) -> Any:
        try:
            failed, answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"a side died with exit code {self._process.exitcode}; was memory short?") from None
        if failed:
            raise RuntimeError(f"a side failed:\n{answer}")
        return answer


def _serve(pipe: Any, prepare: Callable[..., Prepared], args: tuple[Any, ...]) -> None:
    sys.stdout = sys.stderr  # the table alone goes to standard output
    try:
        prepared = prepare(*args)
        pipe.send((False, prepared.seconds))
        while (task := pipe.recv()) is not None:
            start = time.perf_counter()
            value = prepared.tasks[task]()
            if not isinstance(value, Timed):
                value = Timed(time.perf_counter() - start, value)
            pipe.send((False, tuple(value)))
        pipe.send((False, peak_memory()))
    except BaseException:
        pipe.send((True, traceback.format_exc()))


def peak_memory() -> float:
    """Highest resident memory of this process since it began, GiB."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # macOS counts bytes


def race(sides: Mapping[str, Side], tasks: list[str], *, rounds: int, starts: int = 2, apart: bool = False) -> Measured:
    """Every side does every task once a start and once a round.

    apart: one side's process at a time, started anew for every round, where memory does not hold them all at once.
    """
    found = Measured(
        {name: {task: [] for task in tasks} for name in sides},
        {name: [] for name in sides},
        dict.fromkeys(sides, 0.0),
    )
    workers: dict[str, Worker] = {}

    def begin(name: str) -> None:
        workers[name] = worker = Worker(sides[name])
        values = {task: worker.run(task).value for task in tasks}
        found.starts[name].append(Started(worker.prepare, worker.first, values))

    def end(name: str) -> None:
        found.peak[name] = max(found.peak[name], workers.pop(name).close())

    def turn(name: str) -> None:
        for task in tasks:
            found.seconds[name][task].append(workers[name].run(task).seconds)

    names = list(sides)
    if not apart:
        for start in range(starts):
            for name in names:
                begin(name)
                if start < starts - 1:
                    end(name)
    for number in range(max(rounds, starts) if apart else rounds):
        order = names[number % len(names) :] + names[: number % len(names)]
        for name in order:
            if apart:
                begin(name)
            if number < rounds:
                turn(name)
            if apart:
                end(name)
            progress(f"round {number + 1}, {name}: {found.seconds[name]}")
    for name in list(workers):
        end(name)
    return found


def progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class Ratio(NamedTuple):
    """Their time over ours, turn by turn: above 1 we are faster."""

    median: float
    low: float
    high: float


def ratio(theirs: list[float], ours: list[float]) -> Ratio:
    """Raises ValueError unless both took the same number of turns."""
    turns = [a / b for a, b in zip(theirs, ours, strict=True)]
    return Ratio(statistics.median(turns), min(turns), max(turns))


def speed_rows(found: Measured, ours: str, units: Mapping[str, float] | None = None) -> list[dict[str, Any]]:
    """A row a task: the median seconds of every side, and the ratio of each to `ours`; `units` divides a task's time
    (steps or images in it)."""
    rows = []
    for task in found.seconds[ours]:
        if not found.seconds[ours][task]:
            continue
        per = (units or {}).get(task, 1)
        row: dict[str, Any] = {"task": task}
        for side, seconds in found.seconds.items():
            row[side] = statistics.median(seconds[task]) / per
        for side, seconds in found.seconds.items():
            if side != ours:
                row[f"{side} / {ours}"] = ratio(seconds[task], found.seconds[ours][task])
        rows.append(row)
    return rows


def start_rows(found: Measured) -> list[dict[str, Any]]:
    """What comes before the first result: getting ready, and every task's first call beyond its median."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for side, starts in found.starts.items():
        for number, start in enumerate(starts[:2]):
            usual = {task: statistics.median(turns) for task, turns in found.seconds[side].items() if turns}
            beyond = {f"first {t}, beyond the usual": max(s - usual.get(t, 0.0), 0.0) for t, s in start.first.items()}
            for what, seconds in (start.prepare | beyond).items():
                pair = rows.setdefault(what, [{"seconds": f"{what}{label}"} for label in STARTS])
                pair[number][side] = seconds
    return [row for pair in rows.values() for row in pair if len(row) > 1]


def markdown(rows: list[dict[str, Any]]) -> str:
    """Dicts with the same keys in the same order -> a Markdown table; a Ratio shows its range."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(_shown(row.get(column, '')) for column in columns)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    if isinstance(value, Ratio):
        return f"{value.median:.2f} [{value.low:.2f}, {value.high:.2f}]"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def machine() -> str:
    """Processor, cores, versions and how busy it was before, in one line: figures from a busy machine are none."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    versions = ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    processor = found[1] if found else platform.processor()
    return f"{processor}, {cores()} logical cores; {versions}; load before the run {LOAD:.1f}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def cores() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def print_report(title: str, tables: Mapping[str, list[dict[str, Any]]]) -> None:
    """Every table in Markdown, then everything as one JSON object."""
    command = f"python -m benchmarks.{Path(sys.argv[0]).stem} {' '.join(sys.argv[1:])}".strip()
    print(f"# {title}\n\n`{command}`\n\n{machine()}\n")
    for name, rows in tables.items():
        if rows:
            print(f"{name}\n\n{markdown(rows)}")
    print(json.dumps({"command": command, "machine": machine(), **tables}, default=list))
