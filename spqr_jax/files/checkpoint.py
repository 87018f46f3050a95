"""Pytrees of arrays in a work directory, through Orbax; what can be loaded is whole."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from spqr_jax import params as params_lib
from spqr_jax.devices import mesh as mesh_lib
from spqr_jax.devices import processes
from spqr_jax.files import storage

# Replicas share the writing of a leaf from this many bytes each: Orbax compiles a program for every shape it slices, on
# every device, which for the hundreds of shapes of a UNet takes longer than the writing.
MIN_SLICE_BYTES = 64 * 2**20


def save(path: Path, tree: dict[str, Any]) -> None:
    """Write nested dicts of arrays at `path`, replacing what is there; every process calls this, with the same tree.

    On a file system the directory is renamed when its last byte is written: it is whole or absent. An object store
    cannot rename: there Orbax writes commit_success.txt last, and `load` refuses a directory without it.
    Raises OSError when the disk refuses.
    """
    path = storage.absolute(path)
    # Flat names keep list positions ("0", "1") strings on the way back.
    arrays = mesh_lib.replicate(params_lib.flatten(tree), mesh_lib.make())
    if storage.remote(path):
        with _context(), _refusals(path):
            ocp.save(path, arrays, overwrite=True)
        return
    partial = path.with_name(path.name + ".partial")
    if processes.first():
        storage.remove(partial)
        path.parent.mkdir(parents=True, exist_ok=True)
    processes.wait(f"save {path}")
    with _context(), _refusals(path):
        ocp.save(partial, arrays)
    if processes.first():
        storage.remove(path)
        partial.rename(path)
    processes.wait(f"saved {path}")


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote, as NumPy arrays. Raises FileNotFoundError, or ValueError naming a damaged directory."""
    path = storage.absolute(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist; expected a saved checkpoint.")
    everywhere = NamedSharding(mesh_lib.make(), PartitionSpec())
    try:
        stored = ocp.metadata(path).metadata
        wanted = {key: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere) for key, x in stored.items()}
        flat = mesh_lib.to_host(ocp.load(path, wanted))
    except Exception as error:  # Orbax raises many kinds for damaged files
        raise ValueError(f"{path} is damaged ({error}); delete it and run the same command again.") from None
    return params_lib.unflatten(flat)


class Steps:
    """The latest state of a training run on disk, saved by Orbax while the run goes on; a context manager.

    With `directory` None nothing is kept. A state is whole or absent: when its last byte is written, Orbax renames it,
    or on an object store writes its commit file.
    """

    def __init__(self, directory: Path | None, *, every: int):
        if every < 1:
            raise ValueError(f"checkpoint_every must be at least 1, found {every}.")
        self._every = every
        self._saved = None
        if directory is not None:
            self._saved = ocp.training.Checkpointer(
                storage.absolute(directory),
                context=_context(),
                preservation_policy=ocp.training.preservation_policies.LatestN(1),
                cleanup_tmp_directories=True,
            )

    def due(self, step: int) -> bool:
        """Whether a run that keeps its states saves this one."""
        return self._saved is not None and step % self._every == 0

    def restore(self, state: Any) -> tuple[Any, int]:
        """(the latest state, its step), on the devices `state` is on; (state, 0) when there is none.

        Raises ValueError naming a damaged directory.
        """
        if self._saved is None or self._saved.latest is None:
            return state, 0
        latest = self._saved.latest.step
        try:
            return self._saved.load(latest, abstract_state=jax.tree.map(_abstract, state)), latest
        except Exception as error:
            raise ValueError(
                f"{self._saved.directory} is damaged ({error}); delete it and run the same command again."
            ) from None

    def save(self, step: int, state: Any) -> None:
        """Keep `state`; returns once it is copied from the devices. Raises OSError when the disk refuses."""
        if self._saved is not None and (self._saved.latest is None or self._saved.latest.step != step):
            with _refusals(self._saved.directory):  # also of the state before, which was written meanwhile
                self._saved.save_async(step, state, force=True)

    def __enter__(self) -> "Steps":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._saved is not None:
            with _refusals(self._saved.directory):
                self._saved.close()  # waits for what is being written


@contextmanager
def _refusals(path: object) -> Iterator[None]:
    """TensorStore's errors, of whatever type, as the OSError that they report."""
    try:
        yield
    except Exception as error:
        if code := re.search(r"os_error_code='(\d+)'", str(error)):
            number = int(code[1])
            raise OSError(number, os.strerror(number), str(path)) from error
        raise


def _context() -> ocp.Context:
    context = ocp.Context()
    context.array.saving.min_slice_bytes_for_replica_parallel = MIN_SLICE_BYTES
    return context


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
