"""Everything that the pages name exists: files, modules, functions and classes in them, and fields of the config."""

import importlib
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from judges import plugins
from spqr_jax.config import Config
from tests.test_imports import LAYERS

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md"))]
ROOMS = ("spqr_jax", "judges", "convert", "configs", "benchmarks", "examples", "tests")
GROUPS = {plugins.METHODS, plugins.JUDGES, plugins.DATA}  # of entry points
# A path with a folder in it, from the root of the repository.
FILE = re.compile(rf"(?<![\w/.])(?:{'|'.join(ROOMS)}|docs)/[\w/.-]*\w\.(?:py|md)\b")
DOTTED = re.compile(rf"(?<![\w/.])(?:{'|'.join(ROOMS)})(?:\.[A-Za-z_]\w*)+")
LINK = re.compile(r"\]\(([\w/.-]+\.(?:md|png|cff)|[\w/.-]*NOTICE)[)#]")
# `path/file.py`: `name`, `name`
CONTENT = re.compile(r"`([\w/]+\.py)`: ((?:`[\w.]+`(?:, )?)+)")
# Files that a page tells the reader to make.
TO_BE_MADE = {"spqr_jax/methods/my_method.py", "judges/dark.py", "judges/mine.py", "spqr_jax/backbones/toy.py"}
FIELD = re.compile(r"--config\.([a-z_]+(?:\.[a-z_]+)*)")


def is_module(dotted: str) -> bool:
    try:
        return importlib.util.find_spec(dotted) is not None
    except ModuleNotFoundError:
        return False


def exists(dotted: str) -> bool:
    """Whether a dotted name is a module, or something in one. Modules are not imported for their own sake."""
    if is_module(dotted):
        return True
    parent, _, name = dotted.rpartition(".")
    if not parent:
        return False
    if is_module(parent):
        return hasattr(importlib.import_module(parent), name)
    owner, _, middle = parent.rpartition(".")
    return is_module(owner) and hasattr(getattr(importlib.import_module(owner), middle, None), name)


def is_field(dotted: str) -> bool:
    """Whether a dotted name is a field of the config, or a key of one that is a dictionary."""
    value: Any = Config()
    for name in dotted.split("."):
        if isinstance(value, dict):
            return True
        if not hasattr(value, name):
            return False
        value = getattr(value, name)
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_exist(page):
    text = page.read_text(encoding="utf-8")
    named = set(FILE.findall(text)) - TO_BE_MADE
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []
    assert [name for name in sorted(set(LINK.findall(text))) if not (page.parent / name).is_file()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_dotted_names_exist(page):
    named = set(DOTTED.findall(page.read_text(encoding="utf-8"))) - GROUPS
    files = {name for name in named if name.endswith((".py", ".md", ".json"))}
    assert [name for name in sorted(named - files) if not exists(name) and not is_field(name)] == []
    fields = set(FIELD.findall(page.read_text(encoding="utf-8")))
    assert [name for name in sorted(fields) if not is_field(name)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_functions_are_in_the_file_that_is_named_with_them(page):
    for file, listed in CONTENT.findall(page.read_text(encoding="utf-8")):
        for name in re.findall(r"`([\w.]+)`", listed):
            assert exists(f"{file.removesuffix('.py').removesuffix('/__init__').replace('/', '.')}.{name}"), (
                file,
                name,
            )


def test_the_table_of_layers_is_the_one_that_is_tested():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", text.split("## The layers")[1].split("\n## ")[0], re.MULTILINE)
    table = {
        int(layer): {name.removesuffix(".py") for name in re.findall(r"`([\w.]+)`", rooms)} for layer, rooms in rows
    }
    table[len(LAYERS)].remove("__main__")
    assert table == {number: set(rooms) for number, rooms in enumerate(LAYERS, 1)}
