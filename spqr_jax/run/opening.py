"""Open a run: check its config and its work directory, and open everything that the config names."""

import os
from collections.abc import Sequence
from pathlib import Path

import jax

from spqr_jax import attacks, backbones, methods
from spqr_jax.config import Config
from spqr_jax.files import storage
from spqr_jax.files.layout import Workdir
from spqr_jax.pipeline import Pipeline
from spqr_jax.run import adaptations, attempts, identity, probes, protocol
from spqr_jax.run import names as names_lib
from spqr_jax.run.cells import models, plan
from spqr_jax.run.check import check
from spqr_jax.run.generation import sampling_options
from spqr_jax.run.identity import Inputs, digest
from spqr_jax.run.missing import open_all
from spqr_jax.run.stages import Run
from spqr_jax.sampling import call as call_lib
from spqr_jax.sampling.call import Sampling


def open_run(config: Config, workdir: Path) -> Run:
    """Check the config, the work directory, prompts, judges and weights before anything long starts.

    Raises ValueError or PermissionError, each naming the thing at fault and the remedy, and MissingFiles with all
    things that are not there or do not open.
    """
    config = protocol.resolve(config)
    check(config)
    check_workdir(workdir)
    enable_compilation_cache(workdir)
    opened = open_all(config)
    check_backbone(config, opened.backbone)
    check_sampling(config, opened.backbone)
    check_attacks(config, opened.backbone)
    adaptations.check(config, opened)
    inputs = Inputs(
        backbone=storage.sha256(names_lib.weights_path(config.base)),
        prompts={role: digest(rows) for role, rows in opened.prompts.items()},
        data={scenario: dataset.name for scenario, dataset in opened.data.items()},
        checkpoints={source: storage.sha256(path) for source, path in opened.checkpoints.items()},
        pictures=identity.data_sources(config.subjects),
        methods=identity.method_sources(config.subjects),
        adaptations=adaptations.identities(config, opened),
        probes={name: digest(rows) for name, rows in opened.probes.items()},
    )
    subjects, cells = plan(config, workdir, inputs)
    looked_at = models(subjects, cells)
    tried = attempts.plan(config, workdir, inputs, looked_at)
    probed = probes.plan(config, workdir, inputs, looked_at, opened.probes)
    return Run(config, workdir, opened.backbone, opened.jury, opened.prompts, inputs, subjects, cells, tried, probed)


def check_backbone(config: Config, backbone: Pipeline) -> None:
    """Raise ValueError for the first subject whose method is not defined for the backbone, naming both."""
    for subject in config.subjects:
        if not subject.checkpoint:
            try:
                methods.find(subject.method).check_backbone(backbone)
            except ValueError as error:
                raise ValueError(f"config.subjects[{subject.name}]: {error}") from error


def check_attacks(config: Config, backbone: Pipeline) -> None:
    """Raise ValueError for the first attack that is not defined for the backbone, naming both."""
    for settings in config.attacks:
        try:
            attacks.find(settings.attack).check_backbone(backbone)
        except ValueError as error:
            raise ValueError(f"config.attacks[{settings.name}]: {error}") from error


def check_sampling(config: Config, backbone: Pipeline) -> None:
    """Raise ValueError for a scheduler, a size or a length of texts that the backbone does not take."""
    how = Sampling(**sampling_options(config))
    try:
        call_lib.tables_of(backbone, how)
        backbones.of(backbone).with_length(backbone, how.max_sequence_length)
    except ValueError as error:
        raise ValueError(f"config.generation: {error}") from error


def only(run: Run, names: Sequence[str] | None) -> Run:
    """The run with these subjects alone, all when None. Raises ValueError for a name that the config does not have."""
    subjects = [subject for subject in run.subjects if subject.name in chosen(run.config, names)]
    cells = [cell for cell in run.cells if cell.subject in subjects]
    tried = [attempt for attempt in run.attempts if attempt.model.subject in subjects]
    probed = [probe for probe in run.probes if probe.model.subject in subjects]
    return run._replace(subjects=subjects, cells=cells, attempts=tried, probes=probed)


def chosen(config: Config, names: Sequence[str] | None) -> list[str]:
    """The names of the config's subjects that are among these, all when None. Raises as `only`."""
    known = [subject.name for subject in config.subjects]
    for name in names or ():
        if name not in known:
            raise ValueError(f"--subjects: {name!r} is none of the config's; expected some of {', '.join(known)}.")
    return [name for name in known if names is None or name in names]


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
    """Keep compiled programs in the work directory, unless JAX_COMPILATION_CACHE_DIR names another place."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(storage.absolute(Workdir(workdir).compilation_cache)))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
