"""Run the benchmark.

    python launch.py --config configs/mini.py
    python launch.py --config configs/mini.py --config.bft.seeds="(1, 2, 3)" --workdir runs/seeds
    python launch.py --config configs/mini.py --dry_run
    python launch.py --config configs/mini.py --stages score,report

The same command run again does only the work that is missing. Exit status: 0, 1 if a subject or cell failed, 2 for
bad input, 143 after SIGTERM, when the same command continues.
"""

import os
import sys
from functools import partial
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from spqr_jax.devices import huge_pages
from spqr_jax.run import command_line

# diffusers and transformers are used without PyTorch, deliberately.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

CONFIG = config_flags.DEFINE_config_file("config", None, "configuration file with get_config(), e.g. configs/mini.py")
WORKDIR = flags.DEFINE_string("workdir", None, "where everything is written, also gs://; default runs/<config's name>")
STAGES = flags.DEFINE_list(
    "stages", None, "some of align,generate,finetune,attack,probe,judge,score,report; default all"
)
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
    # Imported here, so that --help and a mistake in a flag are answered at once.
    from spqr_jax.devices import mesh, processes
    from spqr_jax.files import storage
    from spqr_jax.run import cluster, command, stages

    processes.join_if_told(DISTRIBUTED.value, COORDINATOR.value, PROCESS_COUNT.value, PROCESS_INDEX.value)
    config = CONFIG.value
    mesh.split_cpu(config.mesh.cpu_devices)
    workdir = storage.directory(WORKDIR.value or default_workdir())
    chosen = stages.chosen(STAGES.value)
    if EXECUTOR.value:
        status = cluster.submit_command(EXECUTOR.value, config, workdir, sys.argv[1:], EXECUTOR_OPTIONS.value)
    else:
        asked = command.Asked(chosen, SUBJECTS.value, DRY_RUN.value, PROFILE_DIR.value or "", sys.argv)
        status = command.carry_out(config, workdir, asked)
    if status:
        sys.exit(status)


def default_workdir() -> Path:
    return Path("runs") / Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem


if __name__ == "__main__":
    huge_pages.restart()
    logging.set_verbosity(logging.WARNING)  # Orbax and JAX tell a lot at INFO; --verbosity=0 shows it
    # Each of Orbax's threads logs the traceback of an error that the main thread raises anyway.
    logging.get_absl_logger().addFilter(
        lambda record: not record.pathname.endswith("orbax/checkpoint/_src/futures/future.py")
    )
    app.run(
        partial(command_line.guarded, "launch.py", main), flags_parser=partial(command_line.read_flags, "launch.py")
    )
