"""Facts about a run that are not scores: how many images there are, who judged them, what it cost."""

import json
from typing import Any, NamedTuple

from spqr_jax.report.reading import ReportedRun, each_image, unique

SHARED = ("align", "generate_before", "judge_before")


class Cost(NamedTuple):
    """What the cells of a run cost."""

    stages: list[str]
    cells: list[tuple[str, dict[str, Any], dict[str, float], float]]  # cell, rates, seconds by stage, hours
    rates: list[str]
    hours: float


def counts(run: ReportedRun) -> dict[str, Any]:
    """How many images were judged and how many are undecided. Images that cells share are counted once."""
    verdicts = [record["verdict"] for _, record in each_image(run)]
    seeds = sorted({seed for row in run.rows for seed in row.get("seeds") or []})
    return {"images": len(verdicts), "undecided": sum(v == "undecided" for v in verdicts), "seeds": seeds}


def judge_identities(run: ReportedRun) -> dict[str, list[dict[str, Any]]]:
    """The distinct identities of each judge over the cells. More than one means that cells were judged differently."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for cell in run.cells:
        for name, identity in cell.judges.items():
            found.setdefault(name, {})[json.dumps(identity, sort_keys=True)] = identity
    return {name: list(identities.values()) for name, identities in found.items()}


def cost(run: ReportedRun) -> Cost:
    """Rates and seconds by stage of every cell, and the device hours of all of them.

    Every cell lists the seconds of the stages that it shares with the other cells of its subject (SHARED). Here they
    count in the first of these cells only.
    """
    cells = []
    seen: set[tuple[str, str, float]] = set()
    for cell in run.cells:
        seconds = {k: float(v) for k, v in (cell.info.get("seconds") or {}).items() if isinstance(v, int | float)}
        shared = {(cell.subject, stage, value) for stage, value in seconds.items() if stage in SHARED}
        seconds = {stage: v for stage, v in seconds.items() if (cell.subject, stage, v) not in seen}
        seen |= shared
        cells.append((cell.name, cell.info.get("rates") or {}, seconds, sum(seconds.values()) / 3600))
    stages = unique([stage for _, _, seconds, _ in cells for stage in seconds])
    rates = unique([name for _, rates, _, _ in cells for name in rates])
    return Cost(stages, cells, rates, sum(hours for *_, hours in cells))
