"""Files of a work directory, on a file system or on an object store (gs://).

A local directory is a pathlib.Path, and one on Google Cloud Storage an epath.Path. Both have the same methods, and code
that only reads or lists files calls these. Code that writes files calls this module, so that a file is complete or
absent: on a file system it has a temporary name until its last byte is written, and on an object store an object
appears when it is complete.
"""

import contextlib
import hashlib
import io
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

import numpy as np
from absl import logging

REMOTE = "gs://"


def directory(name: str | os.PathLike[str]) -> Path:
    """The directory `name`, a local path or `gs://bucket/folder`; nothing is read or made.

    Raises ValueError for another scheme or no bucket, ModuleNotFoundError naming the package that gs:// needs.
    """
    text = os.fspath(name)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return Path(text)
    if scheme + separator != REMOTE or not rest.strip("/"):
        raise ValueError(f"{text} is no directory that can be used; expected a local path or gs://bucket/folder.")
    import fsspec
    from etils import epath

    try:
        fsspec.get_filesystem_class("gcs")
    except ImportError:
        raise ModuleNotFoundError(f"{text} needs the package gcsfs; install it, or the extra [gcs].") from None
    fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False  # other processes write there too
    return cast(Path, epath.Path(text))


def remote(path: Path) -> bool:
    """Whether a path is on an object store."""
    return str(path).startswith(REMOTE)


def absolute(path: Path) -> Path:
    """The path from the root of its file system; gs:// always is."""
    return path if remote(path) else path.absolute()


@contextlib.contextmanager
def writing(path: Path, *, sync: bool = True) -> Iterator[BinaryIO]:
    """A stream whose bytes become the file `path` when the block ends. If the block fails, an older file stays.

    sync: the bytes reach the disk before the name does, so that a loss of power leaves no damaged file. Files that are
    checked whenever they are read, and that are cheap to make again, need no sync.
    """
    if remote(path):
        buffer = io.BytesIO()
        yield buffer
        path.write_bytes(buffer.getvalue())
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")  # no other writer's, on any host
    try:
        with partial.open("wb") as stream:
            yield stream
            if sync:
                stream.flush()
                os.fsync(stream.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, content: bytes, *, sync: bool = True) -> None:
    """Write a file, complete or not at all; see `writing`."""
    with writing(path, sync=sync) as stream:
        stream.write(content)


def write_text(path: Path, text: str) -> None:
    """Write a text file, complete or not at all, in UTF-8 and with the line ends that `text` has."""
    write_bytes(path, text.encode())


def write_npz(path: Path, **arrays: np.ndarray) -> None:
    """Write named arrays as an npz file, complete or not at all."""
    with writing(path) as stream:
        np.savez(stream, allow_pickle=False, **arrays)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz file by name. Raises FileNotFoundError, ValueError or zipfile.BadZipFile."""
    with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
        return dict(arrays)


def appending(path: Path) -> TextIO:
    """A stream that adds lines to a file.

    Nothing can be added to an object of an object store. There the lines are written, after the older ones, when the
    stream is closed. A process that is killed before that loses its lines.
    """
    return _Appended(path) if remote(path) else path.open("a", encoding="utf-8")


class _Appended(io.StringIO):
    def __init__(self, path: Path):
        super().__init__()
        self._path = path

    def close(self) -> None:
        if not self.closed and (lines := self.getvalue()):
            write_text(self._path, (self._path.read_text() if self._path.exists() else "") + lines)
        super().close()


def link(source: Path, target: Path) -> None:
    """Give a file a second name, without a second copy if the file system allows it. An existing `target` stays."""
    if target.exists():
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(source, target)
    except OSError:  # another file system, one without hard links, or an object store
        write_bytes(target, source.read_bytes(), sync=False)


def set_aside(path: Path, why: str) -> None:
    """Rename a damaged file or directory, so that it is made again but not lost. why: the reason, for the log."""
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    if path.exists():
        path.rename(aside)
        logging.warning("%s is damaged (%s); set aside as %s and made again.", path, why, aside.name)


def remove(path: Path) -> None:
    """Delete a directory and its content, if it exists."""
    if remote(path):
        cast(Any, path).rmtree(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def local_copy(path: Path) -> Iterator[Path]:
    """A local file with the content of `path`, for code that opens files by name: `path` or a temporary copy."""
    if not remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        copy.write_bytes(path.read_bytes())
        yield copy


@contextlib.contextmanager
def local_directory(path: Path) -> Iterator[Path]:
    """A local directory for code that writes files by name: `path`, or a temporary one that is copied to it."""
    if not remote(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file():
                write_bytes(path / file.relative_to(folder).as_posix(), file.read_bytes())


def sha256(path: Path) -> str:
    """Hash of one file, or of every file of a directory in the order of their names."""
    total = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file()):
        if path.is_dir():
            total.update(file.relative_to(path).as_posix().encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                total.update(chunk)
    return total.hexdigest()
