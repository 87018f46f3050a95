"""Pytrees of arrays in a work directory, written by Orbax. A checkpoint that can be loaded is complete."""

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

# Devices that hold the same leaf share its writing if each part has at least this many bytes. For every shape that it
# slices, Orbax compiles a program on every device. For the hundreds of shapes of a UNet this takes longer than writing.
MIN_SLICE_BYTES = 64 * 2**20


def save(path: Path, tree: dict[str, Any]) -> None:
    """Write nested dicts of arrays at `path`, and replace an older checkpoint there.

    Every process calls this with the same tree. On a file system the directory gets its name after its last byte is
    written, so it is complete or absent. An object store cannot rename. There Orbax writes commit_success.txt last, and
    `load` refuses a directory without it. Raises OSError if the disk is full or cannot be written.
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
    """The tree that `save` wrote, as NumPy arrays. Raises FileNotFoundError, or ValueError for a damaged directory."""
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

    With `directory` None nothing is kept. A state is complete or absent: after its last byte, Orbax renames it, or on
    an object store writes its commit file.
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
        """Whether the state after this step is to be saved. False if no states are kept."""
        return self._saved is not None and step % self._every == 0

    def restore(self, state: Any) -> tuple[Any, int]:
        """(the latest state, its step), placed on the devices like `state`; (state, 0) if no state is saved.

        Raises ValueError that names a damaged directory.
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
        """Save `state`. Returns when it is copied from the devices. Raises OSError if the disk cannot be written."""
        if self._saved is not None and (self._saved.latest is None or self._saved.latest.step != step):
            with _refusals(self._saved.directory):  # also those of the state before, which was written meanwhile
                self._saved.save_async(step, state, force=True)

    def __enter__(self) -> "Steps":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._saved is not None:
            with _refusals(self._saved.directory):
                self._saved.close()  # waits until the last state is written


@contextmanager
def _refusals(path: object) -> Iterator[None]:
    """Raise the OSError that an error of TensorStore reports, in place of that error."""
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
