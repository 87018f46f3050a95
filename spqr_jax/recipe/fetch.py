"""Get the pinned npm packages the emoji world is made from, and read their members.

A package is downloaded once by the npm client (``npm pack``) into a cache folder; its sha256 is checked at every use.
Archives are never unpacked to disk: wanted members are read into memory, so no member name can leave the cache folder.
"""

import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from spqr_jax.files import storage

DEFAULT_CACHE = Path.home() / ".cache" / "spqr_jax"
NPM_TIMEOUT_S = 1800


class Package(NamedTuple):
    """One pinned npm package: registry name, exact version, and sha256 of its tgz."""

    name: str
    version: str
    sha256: str

    @property
    def filename(self) -> str:
        """The file name ``npm pack`` gives the archive."""
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


PACKAGES = {
    "noto": Package(
        "emoji-datasource-google", "16.0.0", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"
    ),
    "twemoji": Package(
        "emoji-datasource-twitter", "16.0.0", "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877"
    ),
    "fluent": Package(
        "@lobehub/fluent-emoji-3d", "1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"
    ),
    "cldr": Package(
        "cldr-annotations-full", "48.2.0", "28576e51225deb51e3ddd734b0f824a0079682cb5d8c27faa9f68149317a14d1"
    ),
    "cldr_derived": Package(
        "cldr-annotations-derived-full", "48.2.0", "4be946ff5815f806ec78b50363d577a769f2fbfb90c6380a44e161a92436996e"
    ),
}


def fetch(package: Package, cache: Path = DEFAULT_CACHE) -> Path:
    """Path of the verified archive of ``package``, downloaded with npm if ``cache`` does not hold it.

    Raises RuntimeError if npm is missing or fails, ValueError if the archive's sha256 is not the pinned one.
    """
    path = Path(cache) / package.filename
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _npm_pack(package, path)
    found = storage.sha256(path)
    if found != package.sha256:
        raise ValueError(f"{path}: sha256 is {found}, expected {package.sha256}; delete the file and run again")
    return path


def read_members(archive: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Contents of the regular files in ``archive`` (tgz) whose member name satisfies ``wanted``; links are left out."""
    with tarfile.open(archive, "r:gz") as tar:
        members = (member for member in tar if member.isreg() and wanted(member.name))
        return {member.name: _read(tar, member) for member in members}


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = tar.extractfile(member)
    if stream is None:
        raise ValueError(f"{tar.name!r}: member {member.name} is not a regular file")
    return stream.read()


def _npm_pack(package: Package, path: Path) -> None:
    spec = f"{package.name}@{package.version}"
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError(
            f"npm was not found: it is needed to get {spec}; install Node.js with npm, or put {path} there"
        )
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [npm, "pack", "--loglevel=error", "--ignore-scripts", spec]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=NPM_TIMEOUT_S)
        packed = Path(folder) / package.filename
        if done.returncode != 0 or not packed.is_file():
            reason = done.stderr.strip().splitlines()[:1] or ["no message"]
            raise RuntimeError(
                f"npm pack {spec} failed (exit {done.returncode}): {reason[0]}; check the npm registry access"
            )
        os.replace(packed, path)  # whole or not at all
