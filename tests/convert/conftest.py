"""What the tests of weight files share."""

import pytest


@pytest.fixture(scope="module")
def bases(reference):
    """kind -> the random pipeline of tests/conftest.py, loaded once a file of tests."""
    import convert

    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = convert.load(reference(kind)[1])
        return made[kind]

    return get
