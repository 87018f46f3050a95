"""Idle time between generation's batches, from a profile of a run.

    python launch.py --config configs/mini.py --subjects "No alignment" --stages align --workdir runs/gaps
    python launch.py --config configs/mini.py --subjects "No alignment" --stages generate --workdir runs/gaps \
        --profile_dir runs/gaps/profile
    python -m benchmarks.gaps runs/gaps/profile

A batch is one execution of the sampler; a gap is the time from the end of one to the start of the next on the same
device. On a CPU an execution of the sampler is told from others by taking longer than --least seconds, on a GPU or TPU
(untried) by its name.
"""

import argparse
import gzip
import itertools
import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

CPU_EXECUTION = "ThunkExecutor::Execute (wait for completion)"
SAMPLER = "jit_sample"


class Span(NamedTuple):
    """Seconds since the profile began."""

    start: float
    end: float


def events(folder: Path) -> list[dict[str, Any]]:
    """Complete events of the newest profile in a folder. Raises FileNotFoundError if there is none."""
    files = sorted(folder.rglob("*.trace.json.gz"))
    if not files:
        raise FileNotFoundError(f"{folder}: no *.trace.json.gz; make one with --profile_dir {folder}")
    with gzip.open(files[-1]) as file:
        return [event for event in json.load(file)["traceEvents"] if event.get("ph") == "X"]


def batches(found: list[dict[str, Any]], least: float) -> list[Span]:
    """The sampler's executions in order; those of several devices at once are one batch, which ends with the last."""
    runs = [e for e in found if e["name"].startswith(SAMPLER)]
    runs = runs or [e for e in found if e["name"] == CPU_EXECUTION and e["dur"] > least * 1e6]
    spans: list[Span] = []
    for event in sorted(runs, key=lambda event: event["ts"]):
        start, end = event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6
        if spans and start < spans[-1].end - (spans[-1].end - spans[-1].start) / 2:
            spans[-1] = Span(spans[-1].start, max(end, spans[-1].end))
        else:
            spans.append(Span(start, end))
    return spans


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("profile", type=Path, help="folder given to --profile_dir")
    parser.add_argument("--least", type=float, default=0.3, help="seconds a batch takes at least, on a CPU")
    flags = parser.parse_args()
    spans = batches(events(flags.profile), flags.least)
    if len(spans) < 2:
        raise SystemExit(f"{flags.profile}: {len(spans)} batches found, expected two or more; see --least.")
    gaps = [max(later.start - earlier.end, 0.0) for earlier, later in itertools.pairwise(spans)]
    shares = [gap / (span.end - span.start) for gap, span in zip(gaps, spans, strict=False)]
    print(f"{len(spans)} batches, median {statistics.median(s.end - s.start for s in spans):.3f} s")
    print(f"gaps: {', '.join(f'{1000 * gap:.1f} ms ({share:.1%})' for gap, share in zip(gaps, shares, strict=True))}")
    print(f"all: {sum(gaps) / (spans[-1].end - spans[0].start):.2%} of the time from first to last")


if __name__ == "__main__":
    main()
