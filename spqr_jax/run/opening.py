"""A run from its config to its report: open and check everything, write the manifest, score, show."""

import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

from absl import logging

from spqr_jax import config as config_lib
from spqr_jax.config import Config
from spqr_jax.files import storage
from spqr_jax.methods.tools import pictures
from spqr_jax.run import jury
from spqr_jax.run import names as names_lib
from spqr_jax.run.cells import plan
from spqr_jax.run.check import check
from spqr_jax.run.identity import Inputs, digest
from spqr_jax.run.stages import Run

PACKAGES = ("spqr-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "onnxruntime", "numpy", "transformers")


def open_run(config: Config, workdir: Path) -> Run:
    """Check the config, the work directory, prompts, judges and weights before anything long starts.

    Raises ValueError, FileNotFoundError or PermissionError, each naming the thing at fault and the remedy.
    """
    check(config)
    check_workdir(workdir)
    enable_compilation_cache(workdir)
    prompt_sets = names_lib.prompts(config)
    bench = jury.open_bench(config.judges)
    checkpoints = {s.checkpoint: names_lib.weights_path(s.checkpoint) for s in config.subjects if s.checkpoint}
    backbone = names_lib.backbone(config)
    inputs = Inputs(
        backbone=storage.sha256(names_lib.weights_path(config.base)),
        prompts={role: digest(rows) for role, rows in prompt_sets.items()},
        data={scenario: names_lib.dataset(config, scenario).name for scenario in config.bft.scenarios},
        checkpoints={source: storage.sha256(path) for source, path in checkpoints.items()},
        pictures=pictures.identities(config.subjects),
    )
    subjects, cells = plan(config, workdir, inputs)
    return Run(config, workdir, backbone, bench, prompt_sets, inputs, subjects, cells)


def only(run: Run, names: list[str] | None) -> Run:
    """The run with these subjects alone, all when None. Raises ValueError for a name that the config does not have."""
    if names is None:
        return run
    known = [s.name for s in run.subjects]
    for name in names:
        if name not in known:
            raise ValueError(f"--subjects: {name!r} is none of the config's; expected some of {', '.join(known)}.")
    subjects = [s for s in run.subjects if s.name in names]
    return run._replace(subjects=subjects, cells=[c for c in run.cells if c.subject in subjects])


def check_workdir(workdir: Path) -> None:
    """Create the work directory. Raises PermissionError when it cannot be written, ValueError when it is a file."""
    try:
        is_file = workdir.exists() and not workdir.is_dir()
        if not is_file:
            workdir.mkdir(parents=True, exist_ok=True)
            probe = workdir / f".probe-{os.getpid()}"
            probe.touch()
            probe.unlink(missing_ok=True)
    except Exception as error:  # an object store's client raises many kinds
        reason = getattr(error, "strerror", None) or error
        raise PermissionError(f"--workdir {workdir} cannot be written ({reason}); choose another.") from None
    if is_file:
        raise ValueError(f"--workdir {workdir} is a file; choose a directory.")


def enable_compilation_cache(workdir: Path) -> None:
    """Compiled programs are kept beside the run, unless JAX_COMPILATION_CACHE_DIR says elsewhere."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(storage.absolute(workdir / "compilation_cache")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def write_manifest(run: Run, command: list[str]) -> None:
    """manifest.json: what determines the result, and where it ran."""
    import jax

    manifest: dict[str, Any] = {
        "config": config_lib.as_dict(run.config),
        "command": " ".join(["python", *command]),
        "versions": {name: _version(name) for name in PACKAGES},
        "devices": sorted({f"{device.platform}: {device.device_kind}" for device in jax.devices()}),
        "sha256": run.inputs._asdict(),
        "judges": run.bench.identities(),
    }
    manifest |= names_lib.measured(run.config)
    text = json.dumps(manifest, indent=2, sort_keys=True, default=str)
    storage.write_text(run.workdir / "manifest.json", text + "\n")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def finish(config: Config, workdir: Path, chosen: set[str]) -> None:
    """Score and report from the records alone; needs no model and no accelerator."""
    from spqr_jax import report
    from spqr_jax.score import leaderboard

    if "score" in chosen:
        if not any(workdir.glob("cells/*/cell.json")):
            logging.warning("no complete cell in %s: nothing to score.", workdir)
            return
        bounds = (config.score.fid_min, config.score.fid_max)
        board = leaderboard.build(
            workdir, fid_bounds=bounds if bounds[1] > bounds[0] else None, replicates=config.score.replicates
        )
        leaderboard.write(workdir, board)
        print(leaderboard.table(board))
    if "report" in chosen:
        r = config.report
        path = report.write(workdir, tables=r.tables or None, figures=r.figures or None, prompts=r.prompts, blur=r.blur)
        print(f"Report: {path}")
