"""A whole cell of the benchmark on the emoji world, or a sweep: ours against diffusers, PEFT and ONNX Runtime.

    python -m benchmarks.cell [--pictures 250] [--profile standard] [--rounds 1]
    python -m benchmarks.cell --sweep --pictures 100

Generate harmful and benign images, fine-tune, generate again, judge, score: from the start of the process to its end,
imports and compilation included, in turn on one machine. Ours runs twice a round, without and with a filled compilation
cache, which the cells of a sweep share; it also writes records, intervals and the report, the other side only figures.
Our judges work while images are generated: "judge" is what is left of it after the last image.

A sweep is twelve cells in one process: the subjects of configs/mini.py under all profiles. They are aligned beforehand,
and both sides load the same diffusers directories.
"""

import argparse
import itertools
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
PROFILES = ("lite", "moderate", "standard")
COLD, WARM, THEIRS = "ours", "ours, cache filled", "diffusers"


def settings(pictures: int, profiles: tuple[str, ...], subjects: tuple[Subject, ...]) -> Config:
    """configs/mini.py with other subjects and profiles; every value of its protocol and the steps are filled in."""
    from configs import mini
    from spqr_jax.run import bft, protocol

    config = mini.get_config()
    config.subjects = subjects
    config.prompts.n_harmful = config.prompts.n_benign = pictures
    config.bft.profiles = profiles
    config = protocol.resolve(config)
    for profile in profiles:
        setattr(config.bft.steps, profile, bft.num_steps(config.bft, profile, config.bft.samples))
    return config


def ours(config: Config, workdir: Path) -> Prepared:
    return Prepared({"cells": lambda: our_cells(config, workdir)}, {})


def theirs(config: Config, workdir: Path, batch: int, layout: str, threads: int) -> Prepared:
    return Prepared({"cells": lambda: torch_cell.cells(config, workdir, batch, layout, threads)}, {})


def aligning(directory: Path) -> Prepared:
    return Prepared({"align": lambda: aligned(directory)}, {})


def aligned(directory: Path) -> tuple[Subject, ...]:
    """The subjects of configs/mini.py as checkpoints: diffusers directories of what their methods made."""
    import convert
    from configs import mini
    from spqr_jax.run import opening, protocol
    from spqr_jax.run.stages.align import make_safe

    run = opening.open_run(protocol.resolve(mini.get_config()), directory / "run")
    subjects = []
    for subject in run.subjects:
        place = directory / subject.name
        convert.save_diffusers(make_safe(run, subject), place)
        subjects.append(Subject(subject.name, checkpoint="" if subject.settings.method == "none" else str(place)))
    return tuple(subjects)


def our_cells(config: Config, workdir: Path) -> dict[str, dict[str, float]]:
    """As `launch.py` runs them; seconds and figures as `torch_cell.cells`."""
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
    folders = [*(subject.folder for subject in state.subjects), *(cell.folder for cell in state.cells)]
    times = [read_times(folder) for folder in folders]
    names = {"generate_before": "generate before", "finetune": "fine-tune", "generate_after": "generate after"}
    seconds = {shown: sum(t[name]["seconds"] for t in times if name in t) for name, shown in names.items()}
    seconds["judge"] = made - start - sum(seconds.values())
    seconds["score"] = finished - made
    figures = {}
    for row in json.loads((workdir / "leaderboard.json").read_text())["rows"]:
        cell = f"{row['subject']}, {row['profile']}: "
        for phase, (name, shown) in itertools.product(("before", "after"), FIGURES):
            figures[f"{cell}{shown} {phase}"] = row[f"{name}_{phase}"]
    return {"seconds": seconds, "figures": figures}


FIGURES = (("h", "h"), ("clip", "CLIP"), ("fid", "FID"))


def measure(side: Side) -> dict[str, Any]:
    """All cells in a process of its own: stages, the rest of the process's time as "start", and peak memory."""
    begun = time.perf_counter()
    worker = Worker(side)
    result = worker.run("cells").value
    peak = worker.close()
    whole = time.perf_counter() - begun
    seconds = {"start": 0.0} | result["seconds"]
    seconds["start"] += whole - sum(seconds.values())
    return {"seconds": seconds, "whole": whole, "peak": peak, "figures": result["figures"]}


def rounds(config: Config, flags: argparse.Namespace, scratch: Path) -> dict[str, list[dict[str, Any]]]:
    """side -> one measurement a round; odd rounds begin with ours, even ones with diffusers."""
    found: dict[str, list[dict[str, Any]]] = {COLD: [], WARM: [], THEIRS: []}
    for number in range(flags.rounds):
        place = scratch / str(number)
        environment = side_by_side.our_environment(place / "cache")
        sides = {
            COLD: Side(ours, (config, place / "cold"), environment),
            WARM: Side(ours, (config, place / "warm"), environment),
            THEIRS: Side(theirs, (config, place / "theirs", flags.batch, flags.layout, flags.threads)),
        }
        for name in [COLD, WARM, THEIRS] if number % 2 == 0 else [THEIRS, COLD, WARM]:
            found[name].append(measure(sides[name]))
            side_by_side.progress(f"round {number + 1}, {name}: {found[name][-1]}")
    return found


def tables(found: dict[str, list[dict[str, Any]]], config: Config) -> dict[str, list[dict[str, Any]]]:
    stages = []
    for name, runs in found.items():
        row: dict[str, Any] = {"median seconds": name}
        whole = row["whole"] = statistics.median(run["whole"] for run in runs)
        for stage in STAGES:
            seconds = statistics.median(run["seconds"][stage] for run in runs)
            row[stage] = f"{seconds:.1f} ({seconds / whole:.0%})"
        row["peak GiB"] = max(run["peak"] for run in runs)
        stages.append(row)
    subjects, profiles = len(config.subjects), config.bft.profiles
    pictures = subjects * (1 + len(profiles)) * (config.prompts.n_harmful + config.prompts.n_benign)
    steps = subjects * sum(getattr(config.bft.steps, profile) for profile in profiles)
    rates = [
        {
            "": name,
            "pictures/s": statistics.median(pictures / _generation(run) for run in runs),
            "steps/s": statistics.median(steps / run["seconds"]["fine-tune"] for run in runs),
            "seconds a leaderboard row": statistics.median(run["whole"] for run in runs) / subjects / len(profiles),
        }
        for name, runs in found.items()
    ]
    wholes = {name: [run["whole"] for run in runs] for name, runs in found.items()}
    ratios = [
        {f"{THEIRS} / ...": name, "times": side_by_side.ratio(wholes[THEIRS], wholes[name])} for name in (COLD, WARM)
    ]
    keys = found[THEIRS][0]["figures"]
    figures = [{"": key} | {name: runs[0]["figures"][key] for name, runs in found.items()} for key in keys]
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
    parser.add_argument("--pictures", type=int, default=250, help="harmful, and as many benign ones, in each phase")
    parser.add_argument("--profile", choices=PROFILES, default="standard", help="of the one cell")
    parser.add_argument("--sweep", action="store_true", help="twelve cells: four aligned subjects, three profiles")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64, help="pictures at once in diffusers; ours takes 64")
    parser.add_argument("--layout", choices=("contiguous", "channels_last"), default="contiguous", help="of diffusers")
    parser.add_argument("--threads", type=int, default=side_by_side.cores(), help="of PyTorch; default all cores")
    flags = parser.parse_args()
    subjects: tuple[Subject, ...] = (Subject("No alignment"),)
    profiles: tuple[str, ...] = (flags.profile,)
    with tempfile.TemporaryDirectory() as folder:
        if flags.sweep:
            worker = Worker(Side(aligning, (Path(folder, "aligned"),), {"JAX_PLATFORMS": "cpu"}))
            subjects, profiles = worker.run("align").value, PROFILES
            worker.close()
        config = settings(flags.pictures, profiles, subjects)
        found = rounds(config, flags, Path(folder))
    cells = f"{len(subjects) * len(profiles)} cells" if flags.sweep else f"One cell, {flags.profile}"
    title = f"{cells}: {flags.pictures} + {flags.pictures} pictures before and after"
    side_by_side.print_report(title, tables(found, config))


if __name__ == "__main__":
    main()
