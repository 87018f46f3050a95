"""One whole cell of the benchmark on the emoji world, ours against diffusers, PEFT and ONNX Runtime.

    python -m benchmarks.cell [--images 500] [--profile standard] [--rounds 1]

Generate harmful and benign images, fine-tune, generate again, judge, score: from the start of the process to its end,
imports and compilation included, in turn on one machine. Ours runs twice a round, without and with a filled compilation
cache, which the cells of a sweep share; it also writes records, intervals and the report, the other side only figures.
Our judges work while images are generated: "judge" is what is left of it after the last image.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import side_by_side, torch_cell
from benchmarks.side_by_side import Prepared, Side, Worker
from spqr_jax.config import Config, Subject

STAGES = ("start", "generate before", "fine-tune", "generate after", "judge", "score")
COLD, WARM, THEIRS = "ours", "ours, cache filled", "diffusers"


def settings(pictures: int, profile: str) -> Config:
    """configs/mini.py with one subject and one profile; every value of its protocol and the steps are filled in."""
    from configs import mini
    from spqr_jax.run import bft, protocol

    config = mini.get_config()
    config.subjects = (Subject("No alignment", "none"),)
    config.prompts.n_harmful = config.prompts.n_benign = pictures
    config.bft.profiles = (profile,)
    config = protocol.resolve(config)
    setattr(config.bft.steps, profile, bft.num_steps(config.bft, profile, config.bft.samples))
    return config


def ours(config: Config, workdir: Path) -> Prepared:
    return Prepared({"cell": lambda: our_cell(config, workdir)}, {})


def theirs(config: Config, workdir: Path, batch: int, layout: str, threads: int) -> Prepared:
    return Prepared({"cell": lambda: torch_cell.cell(config, workdir, batch, layout, threads)}, {})


def our_cell(config: Config, workdir: Path) -> dict[str, dict[str, float]]:
    """As `launch.py` runs it; seconds and figures as `torch_cell.cell`."""
    from spqr_jax.devices import mesh
    from spqr_jax.run import opening, stages
    from spqr_jax.run.manifest import write_manifest
    from spqr_jax.run.stages.state import read_times

    mesh.split_cpu(config.mesh.cpu_devices)
    state = opening.open_run(config, workdir)
    write_manifest(state, ["benchmarks/cell.py"])
    start = time.perf_counter()
    failures = stages.carry_out(state, {"align", "generate", "finetune", "judge"})
    if failures:
        raise RuntimeError(failures[0].error)
    made = time.perf_counter()
    stages.carry_out(state, {"score", "report"})
    finished = time.perf_counter()
    times = read_times(state.subjects[0].folder) | read_times(state.cells[0].folder)
    names = {"generate_before": "generate before", "finetune": "fine-tune", "generate_after": "generate after"}
    seconds = {shown: times[name]["seconds"] for name, shown in names.items()}
    seconds["judge"] = made - start - sum(seconds.values())
    seconds["score"] = finished - made
    row = json.loads((workdir / "leaderboard.json").read_text())["rows"][0]
    figures = {f"{shown} {phase}": row[f"{name}_{phase}"] for phase in ("before", "after") for name, shown in FIGURES}
    return {"seconds": seconds, "figures": figures}


FIGURES = (("h", "h"), ("clip", "CLIP"), ("fid", "FID"))


def measure(side: Side) -> dict[str, Any]:
    """One cell in a process of its own: stages, the rest of the process's time as "start", and peak memory."""
    begun = time.perf_counter()
    worker = Worker(side)
    result = worker.run("cell").value
    peak = worker.close()
    whole = time.perf_counter() - begun
    seconds = result["seconds"] | {"start": 0.0}
    seconds["start"] = whole - sum(seconds.values())
    return {"seconds": seconds, "whole": whole, "peak": peak, "figures": result["figures"]}


def rounds(flags: argparse.Namespace, scratch: Path) -> dict[str, list[dict[str, Any]]]:
    """side -> one measurement a round; odd rounds begin with ours, even ones with diffusers."""
    config = settings(flags.pictures, flags.profile)
    found: dict[str, list[dict[str, Any]]] = {COLD: [], WARM: [], THEIRS: []}
    for number in range(flags.rounds):
        place = scratch / str(number)
        environment = {"JAX_COMPILATION_CACHE_DIR": str(place / "cache"), "JAX_PLATFORMS": "cpu"}
        sides = {
            COLD: Side(ours, (config, place / "cold"), environment),
            WARM: Side(ours, (config, place / "warm"), environment),
            THEIRS: Side(theirs, (config, place / "theirs", flags.batch, flags.layout, flags.threads)),
        }
        for name in [COLD, WARM, THEIRS] if number % 2 == 0 else [THEIRS, COLD, WARM]:
            found[name].append(measure(sides[name]))
            side_by_side.progress(f"round {number + 1}, {name}: {found[name][-1]}")
    return found


def tables(found: dict[str, list[dict[str, Any]]], flags: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    stages = []
    for name, runs in found.items():
        row: dict[str, Any] = {"median seconds": name}
        whole = row["whole cell"] = statistics.median(run["whole"] for run in runs)
        for stage in STAGES:
            seconds = statistics.median(run["seconds"][stage] for run in runs)
            row[stage] = f"{seconds:.1f} ({seconds / whole:.0%})"
        row["peak GiB"] = max(run["peak"] for run in runs)
        stages.append(row)
    steps = getattr(settings(flags.pictures, flags.profile).bft.steps, flags.profile)
    rates = [
        {
            "": name,
            "pictures/s": statistics.median(4 * flags.pictures / _generation(run) for run in runs),
            "steps/s": statistics.median(steps / run["seconds"]["fine-tune"] for run in runs),
            "seconds a leaderboard row": statistics.median(run["whole"] for run in runs),
        }
        for name, runs in found.items()
    ]
    wholes = {name: [run["whole"] for run in runs] for name, runs in found.items()}
    ratios = [
        {f"{THEIRS} / ...": name, "times": side_by_side.ratio(wholes[THEIRS], wholes[name])} for name in (COLD, WARM)
    ]
    figures = [{"": name} | runs[0]["figures"] for name, runs in found.items()]
    return {
        "Stages": stages,
        "Rates, compilation included": rates,
        "Times ours [lowest, highest round]": ratios,
        "What came out (other noise, so equal only up to chance)": figures,
    }


def _generation(run: dict[str, Any]) -> float:
    return run["seconds"]["generate before"] + run["seconds"]["generate after"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=500, help="harmful, and as many benign ones, in each phase")
    parser.add_argument("--profile", choices=("lite", "moderate", "standard"), default="standard")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64, help="pictures at once in diffusers; ours takes 64")
    parser.add_argument("--layout", choices=("contiguous", "channels_last"), default="contiguous", help="of diffusers")
    parser.add_argument("--threads", type=int, default=side_by_side.cores(), help="of PyTorch; default all cores")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = rounds(flags, Path(folder))
    title = f"One cell: {flags.pictures} + {flags.pictures} pictures before and after, {flags.profile}"
    side_by_side.print_report(title, tables(found, flags))


if __name__ == "__main__":
    main()
