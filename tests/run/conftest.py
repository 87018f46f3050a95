"""A module of a user's own, which a test writes."""

import importlib
import sys

import pytest

from tests.run.lab import ERASE


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """text -> the file my_lab.py with this text, which is imported anew the next time that it is named."""
    monkeypatch.syspath_prepend(tmp_path / "lab")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # two texts of one size within a second must not be confused
    (tmp_path / "lab").mkdir()

    def written(text: str = ERASE, name: str = "my_lab"):
        forget()
        path = tmp_path / "lab" / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        importlib.invalidate_caches()
        return path

    def forget():
        for name in [name for name in sys.modules if name.partition(".")[0] == "my_lab"]:
            del sys.modules[name]

    yield written
    forget()
