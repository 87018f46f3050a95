"""What the tests of attacks share."""

from collections.abc import Iterator

import pytest

from tests import compilations as compilations_lib


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """A list that grows by one with every program that JAX compiles, or reads from its cache on disk."""
    with compilations_lib.compilations() as names:
        yield names
