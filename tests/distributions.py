"""Small distributions as pip installs them: files in a folder on the path, beside metadata with entry points."""

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest


def install(
    folder: Path, name: str, offers: Mapping[str, Mapping[str, str]], files: Mapping[str, str], version: str = "1.0"
) -> Path:
    """Write a distribution in a folder. offers: group -> name -> "module:attribute". files: path -> text."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [
        f"[{group}]\n" + "\n".join(f"{key} = {value}" for key, value in points.items())
        for group, points in offers.items()
    ]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """`install` into a folder of its own, which is then on the path; modules of these folders are forgotten."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # two texts of one size within a second must not be confused
    before, number = set(sys.modules), iter(range(99))

    def put(name, offers, files, version="1.0"):
        forget()
        folder = install(tmp_path / f"site-{next(number)}", name, offers, files, version)
        monkeypatch.syspath_prepend(folder)
        importlib.invalidate_caches()
        return folder

    def forget():
        for name in set(sys.modules) - before:
            if str(tmp_path) in (getattr(sys.modules[name], "__file__", None) or ""):
                del sys.modules[name]

    yield put
    forget()
