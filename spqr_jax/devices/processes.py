"""Several processes as one program: joining them, dividing work among them, and decisions that all must share.

Every process runs the same stages in the same order, over one mesh of all devices. The first process decides which
results are missing, and writes the small files. Images and verdicts are divided among the processes. All processes see
the same work directory.
"""

import os

import jax
import numpy as np
from jax.experimental import multihost_utils

# A process that is silent for this long counts as dead. The others end too, and the same command continues the run.
HEARTBEAT_SECONDS = 30


def join(address: str | None = None, count: int | None = None, index: int | None = None) -> None:
    """Become one of several processes. Call it before JAX uses a device.

    Without arguments, the environment of the cluster gives the address and the numbers (TPU pods, SLURM, GKE, Open
    MPI). Raises RuntimeError if the other processes do not come, ValueError if the environment does not give them.
    """
    jax.distributed.initialize(address, count, index, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)


def join_if_told(
    distributed: bool | None, address: str | None = None, count: int | None = None, index: int | None = None
) -> None:
    """`join` if `distributed` is true or an address is given.

    Raises ValueError if the cluster started this process as one of many and `distributed` is None. Many runs of the
    same work, unaware of each other, are never intended.
    """
    if distributed or address:
        join(address, count, index)
    elif distributed is None and (name := launched_as_one_of_many()):
        raise ValueError(
            f"{name} says this is one of several processes: add --distributed, or --nodistributed to run alone."
        )


def launched_as_one_of_many() -> str:
    """The name of the environment variable that shows that this is one of several processes; "" if there is none."""
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        if int(os.environ.get(name) or 1) > 1:
            return name
    return "TPU_WORKER_HOSTNAMES" if "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") else ""


def first() -> bool:
    """Whether this is the first process. It decides for all, and writes every file that only one process writes."""
    return jax.process_index() == 0


def mine(index: int) -> bool:
    """Whether item `index` of a list that is divided among the processes belongs to this process."""
    return index % jax.process_count() == jax.process_index()


def agreed(values: np.ndarray) -> np.ndarray:
    """The values of the first process, on every process. Booleans or numbers, of the same shape on all of them."""
    if jax.process_count() == 1:
        return values
    return np.asarray(multihost_utils.broadcast_one_to_all(values))


def wait(name: str) -> None:
    """Wait until every process calls this, so that all may read files that one of them wrote."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
