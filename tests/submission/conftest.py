"""One invented bundle, and copies of it that a test may change."""

from pathlib import Path

import pytest

from spqr_jax.files import storage
from spqr_jax.submission import bundle as bundle_lib
from spqr_jax.submission.bundle import Bundle
from tests.submission import invented


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A folder with the run `run` and its bundle `bundle`, which no test changes."""
    folder = tmp_path_factory.mktemp("made")
    invented.bundle(folder, invented.config(drift=True, seeds=(1, 2), n_harmful=8, n_benign=4))
    return folder


def copy(source: Path, target: Path) -> Path:
    for file in sorted(source.rglob("*")):
        if file.is_file():
            storage.write_bytes(target / file.relative_to(source), file.read_bytes(), sync=False)
    return target


@pytest.fixture(scope="session")
def read(made) -> Bundle:
    """What that bundle says."""
    return bundle_lib.read(made / "bundle")


@pytest.fixture
def copied(made, tmp_path):
    """A bundle that a test may change."""
    return copy(made / "bundle", tmp_path / "bundle")
