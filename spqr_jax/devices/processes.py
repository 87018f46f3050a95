"""Several processes as one program: joining them, sharing out work, and decisions that all must share.

Every process runs the same stages in the same order over one mesh of all devices. The first process decides which
results are missing and writes the small files; images and verdicts are shared out. All processes see the same work
directory.
"""

import os

import jax
import numpy as np
from jax.experimental import multihost_utils

# A process that falls silent for this long is dead: the others end too, and the same command continues.
HEARTBEAT_SECONDS = 30


def join(address: str | None = None, count: int | None = None, index: int | None = None) -> None:
    """Become one of several processes, before JAX touches a device.

    Without arguments, the cluster says who is who (TPU pods, SLURM, GKE, Open MPI). Raises RuntimeError when the others
    do not come, ValueError when the cluster does not say.
    """
    jax.distributed.initialize(address, count, index, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)


def join_if_told(
    distributed: bool | None, address: str | None = None, count: int | None = None, index: int | None = None
) -> None:
    """`join` if told to, by `distributed` or by an address.

    Raises ValueError for a process that the cluster started as one of many and that was told nothing
    (`distributed` None): many silent runs of the same work are never intended.
    """
    if distributed or address:
        join(address, count, index)
    elif distributed is None and (name := launched_as_one_of_many()):
        raise ValueError(
            f"{name} says this is one of several processes: add --distributed, or --nodistributed to run alone."
        )


def launched_as_one_of_many() -> str:
    """The environment variable that says that this is one of several processes; "" if none does."""
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        if int(os.environ.get(name) or 1) > 1:
            return name
    return "TPU_WORKER_HOSTNAMES" if "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") else ""


def first() -> bool:
    """Whether this is the process that decides for all, and that writes each file of which there is one."""
    return jax.process_index() == 0


def mine(index: int) -> bool:
    """Whether item `index` of a list that is shared out is this process's."""
    return index % jax.process_count() == jax.process_index()


def agreed(values: np.ndarray) -> np.ndarray:
    """The first process's values (bool or number, the same shape everywhere), on every process."""
    if jax.process_count() == 1:
        return values
    return np.asarray(multihost_utils.broadcast_one_to_all(values))


def wait(name: str) -> None:
    """Wait until every process is here, so that all may read the files that one wrote."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
