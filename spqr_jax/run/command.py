"""The command `launch.py` without its flags: open the run, do its stages, and print the outcome."""

import contextlib
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import jax

from spqr_jax.config import Config
from spqr_jax.devices import preemption, processes
from spqr_jax.run import dry_run, opening, protocol, stages
from spqr_jax.run.manifest import write_manifest
from spqr_jax.run.missing import MissingFiles
from spqr_jax.run.stages import Unopened


class Asked(NamedTuple):
    """The wishes of one command, beside its config and work directory.

    Attributes:
        stages: names of the stages to do.
        subjects: names of the subjects to work on; None: all.
        dry_run: only list the work that is missing.
        profile_dir: where to write a profile of the devices; "": nowhere.
        command: the command line, for the manifest.
    """

    stages: set[str]
    subjects: Sequence[str] | None = None
    dry_run: bool = False
    profile_dir: str = ""
    command: Sequence[str] = ()


def carry_out(config: Config, workdir: Path, asked: Asked) -> int:
    """Carry out one command. The exit status: 1 if a subject or cell failed, 2 if a dry run found that something is
    missing, else 0. Raises as `opening.open_run`."""
    start, config = time.time(), protocol.resolve(config)
    if not asked.dry_run and not stages.need_models(asked.stages):
        stages.carry_out(Unopened(config, workdir), asked.stages)
        return 0
    if asked.dry_run:
        return show_work(config, workdir, asked.subjects)
    run = opening.only(opening.open_run(config, workdir), asked.subjects)
    if processes.first():
        write_manifest(run, asked.command)
    preemption.listen()
    with profiled(asked.profile_dir):
        failures = stages.carry_out(run, asked.stages)
    if processes.first():
        done = sum(cell.done for cell in run.cells)
        print(f"{done} of {len(run.cells)} cells complete, {time.time() - start:.0f} s.")
    processes.wait("finished")
    if failures:
        print("\nNot finished:\n" + "\n".join(f"  {f.what}: {f.error}" for f in failures), file=sys.stderr)
    return int(bool(failures))


def show_work(config: Config, workdir: Path, subjects: Sequence[str] | None) -> int:
    """Print what a resolved config asks for: all that it lacks, else the work that is missing. The exit status."""
    print(dry_run.plan(config))  # before anything is opened, so that it needs no weights
    try:
        run = opening.only(opening.open_run(config, workdir), subjects)
    except MissingFiles as missing:
        print(f"\n{missing}\n\n{dry_run.unopened(config, opening.chosen(config, subjects), workdir)}")
        return 2
    print(dry_run.table(run))
    return 0


def profiled(directory: str) -> AbstractContextManager[Any]:
    """A context that writes a profile of the devices into the directory, if there is one."""
    if not directory:
        return contextlib.nullcontext()
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # every Python call of a long run would crowd out the work of the devices
    return jax.profiler.trace(directory, profiler_options=options)
