"""Run the benchmark.

    python launch.py --config configs/mini.py
    python launch.py --config configs/mini.py --config.bft.seeds="(1, 2, 3)" --workdir runs/seeds
    python launch.py --config configs/mini.py --dry_run
    python launch.py --config configs/mini.py --stages score,report

The same command run again does only what is missing. Exit status: 0, 1 if a subject or cell failed, 2 for bad input,
143 after SIGTERM, when the same command continues.
"""

import contextlib
import os
import sys
import time
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

# diffusers and transformers are used without PyTorch, deliberately.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

CONFIG = config_flags.DEFINE_config_file("config", None, "configuration file with get_config(), e.g. configs/mini.py")
WORKDIR = flags.DEFINE_string("workdir", None, "where everything is written, also gs://; default runs/<config's name>")
STAGES = flags.DEFINE_list("stages", None, "stages to run, default all: align,generate,finetune,judge,score,report")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "list every cell and what it still needs, then stop")
SUBJECTS = flags.DEFINE_list("subjects", None, "names of the subjects to work on, default all")
EXECUTOR = flags.DEFINE_string("executor", None, "submit one job a subject instead: slurm, or local")
EXECUTOR_OPTIONS = flags.DEFINE_list("executor_options", [], "e.g. partition=gpu,gpus_per_node=1,timeout_min=600")
DISTRIBUTED = flags.DEFINE_bool("distributed", None, "be one of several processes, as SLURM, a TPU pod or GKE says")
COORDINATOR = flags.DEFINE_string("coordinator", None, "address:port of the first process, where no cluster says it")
PROCESS_COUNT = flags.DEFINE_integer("process_count", None, "with --coordinator: number of processes")
PROCESS_INDEX = flags.DEFINE_integer("process_index", None, "with --coordinator: which of them this is, from 0")
PROFILE_DIR = flags.DEFINE_string("profile_dir", None, "write a profile of the run here, for TensorBoard or XProf")
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; did you mean --config {argv[1]}?")
    join_processes()
    from spqr_jax.devices import mesh, preemption, processes
    from spqr_jax.files import storage
    from spqr_jax.run import dry_run, opening, stages

    start = time.time()
    config = CONFIG.value
    mesh.split_cpu(config.mesh.cpu_devices)
    workdir = storage.directory(WORKDIR.value or default_workdir())
    chosen = stages.chosen(STAGES.value)
    if EXECUTOR.value:
        submit(config, workdir, EXECUTOR.value)
        return
    if chosen <= {"score", "report"}:
        if processes.first():
            opening.finish(config, workdir, chosen)
        return
    state = opening.only(opening.open_run(config, workdir), SUBJECTS.value)
    if DRY_RUN.value:
        print(dry_run.table(state))
        return
    if processes.first():
        opening.write_manifest(state, sys.argv)
    preemption.listen()
    with profiled():
        failures = stages.carry_out(state, chosen)
    if processes.first():
        opening.finish(config, workdir, chosen)
        done = sum(cell.done for cell in state.cells)
        print(f"{done} of {len(state.cells)} cells complete, {time.time() - start:.0f} s.")
    processes.wait("finished")
    if failures:
        print("\nNot finished:\n" + "\n".join(f"  {f.what}: {f.error}" for f in failures), file=sys.stderr)
        sys.exit(1)


def default_workdir() -> Path:
    return Path("runs") / Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem


def submit(config, workdir: Path, executor: str) -> None:
    """Hand the run to a cluster; the local one is waited for."""
    from spqr_jax.files import storage
    from spqr_jax.run import cluster

    if storage.remote(workdir):
        raise ValueError(f"--executor keeps its jobs' files in the work directory, which cannot be {workdir}.")
    own = ("--executor", "--workdir")
    passed, skip = [], False
    for argument in sys.argv[1:]:
        if not skip and not argument.startswith(own):
            passed.append(argument)
        skip = not skip and argument.startswith(own) and "=" not in argument
    jobs = cluster.submit(executor, config, workdir, passed, EXECUTOR_OPTIONS.value)
    print(
        f"Submitted {len(jobs) - 1} jobs, one a subject, and {jobs[-1].job_id} for the report; logs in {workdir}/jobs."
    )
    if executor == "local":
        failed = [job.job_id for job in jobs if job.exception() or job.result()]
        if failed:
            sys.exit(f"Not finished: jobs {', '.join(failed)}; see their logs in {workdir}/jobs.")


def join_processes() -> None:
    """Become one of several processes where the flags say so; refuse to be one of many alone."""
    from spqr_jax.devices import processes

    if DISTRIBUTED.value or COORDINATOR.value:
        processes.join(COORDINATOR.value, PROCESS_COUNT.value, PROCESS_INDEX.value)
    elif DISTRIBUTED.value is None and (name := processes.launched_as_one_of_many()):
        raise ValueError(
            f"{name} says this is one of several processes: add --distributed, or --nodistributed to run alone."
        )


def profiled():
    """A context that records what the devices do, if asked to."""
    import jax

    if not PROFILE_DIR.value:
        return contextlib.nullcontext()
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # every Python call of a long run would crowd out what the devices do
    return jax.profiler.trace(PROFILE_DIR.value, profiler_options=options)


def parse_flags(argv: list[str]) -> list[str]:
    """Flags, with every mistake in a config field as one line."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        message = str(error).strip().splitlines()[-1]  # what a config file itself refuses comes as a traceback
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        message = str(error.args[0] if error.args else error)
    print(f"launch.py: {message}\nTry --help.", file=sys.stderr)
    sys.exit(2)


def guarded(argv: list[str]) -> None:
    """main, with what the user can mend as one line instead of a traceback."""
    try:
        main(argv)
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError) as error:
        if logging.get_verbosity() > logging.INFO:
            raise
        print(f"launch.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)  # Orbax and JAX tell a lot at INFO; --verbosity=0 shows it
    # Each of Orbax's threads logs the traceback of an error that the main thread raises anyway.
    logging.get_absl_logger().addFilter(
        lambda record: not record.pathname.endswith("orbax/checkpoint/_src/futures/future.py")
    )
    app.run(guarded, flags_parser=parse_flags)
