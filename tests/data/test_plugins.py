"""Readers of data of installed distributions, and of one's own by their dotted path."""

import json

import numpy as np
import pytest
from PIL import Image

from judges import plugins
from spqr_jax import data
from spqr_jax.data.__main__ import main
from spqr_jax.methods.tools import pictures

GROUP = "spqr_jax.data"
PAIRS = '''"""Lines of a file: image, tabulator, caption."""
from spqr_jax.data.source import of_files

def open_pairs(path, *, prefix=""):
    """A text file with a line for each image."""
    rows = [line.split("\\t") for line in (path / "pairs.tsv").read_text().splitlines()]
    return of_files(f"pairs:{path}", [(path / name, prefix + text) for name, text in rows], "the second column")
'''
OFFERS = {GROUP: {"pairs": "our_lab:open_pairs"}}


@pytest.fixture
def garden(tmp_path):
    folder = tmp_path / "garden"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(np.full((16, 16, 3), 40 * i, np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"flower {i}")
    (folder / "pairs.tsv").write_text("".join(f"{i}.png\tflower {i}\n" for i in range(3)))
    return folder


@pytest.mark.parametrize("kind", ["pairs", "our_lab.open_pairs"])
def test_it_reads_by_name_and_by_dotted_path(installed, garden, kind):
    installed("our-lab", OFFERS, {"our_lab.py": PAIRS}, "0.2")
    source = data.open_source(f"{kind}:{garden}?prefix=a-")
    assert source.captions == ("a-flower 0", "a-flower 1", "a-flower 2")
    start = "our-lab 0.2 our_lab:open_pairs sha256:" if kind == "pairs" else "our_lab.open_pairs sha256:"
    assert source.plugin.startswith(start)
    loaded = data.load(f"{kind}:{garden}", 3, side=16)
    assert loaded.name.endswith(f"read by {source.plugin}") and loaded.images(np.arange(3)).shape == (3, 16, 16, 3)
    assert data.places(f"{kind}:{garden}") == (garden, None)
    mixed = data.open_source(f"folder:{garden} + {kind}:{garden}")
    assert len(mixed) == 6 and mixed.plugin == source.plugin
    with pytest.raises(ValueError, match=f"option 'prefx' is unknown; {kind} knows prefix"):
        data.open_source(f"{kind}:{garden}?prefx=a")


def test_a_changed_reader_is_another_data_set(installed, garden):
    """In the name of the data set, which is part of a cell's id, and in the hash of a method's own images."""
    text, seen = f"pairs:{garden}", []
    for version, code in (("1.0", PAIRS), ("1.1", PAIRS), ("1.0", PAIRS + "# changed\n")):
        installed("our-lab", OFFERS, {"our_lab.py": code}, version)
        data.load.cache_clear()
        seen.append((data.load(text, 3, side=16).name, pictures.identity(text, "mine")))
    assert len({name for name, _ in seen}) == len({content for _, content in seen}) == 3
    assert pictures.identity(f"folder:{garden}", "mine") not in {content for _, content in seen}


def test_the_name_of_a_built_in_kind_cannot_be_taken(installed, garden, caplog):
    installed("a-thief", {GROUP: {"folder": "a_thief:x"}}, {"a_thief.py": "1 / 0"})
    plugins.warn_if_refused.cache_clear()
    assert data.open_source(f"folder:{garden}").plugin == ""
    assert "'folder' of a-thief 1.0 (a_thief:x) is refused" in caplog.text


@pytest.mark.parametrize(
    ("kind", "text", "says"),
    [
        (
            "pairs",
            "1 / 0",
            r"entry point pairs = our_lab:open_pairs of our-lab 1\.0 cannot be loaded \(ZeroDivisionError",
        ),
        ("pairs", "open_pairs = 3", "is no function"),
        ("pairs", "def open_pairs(path): return 3", "returned no Source"),
        ("pairs", "def open_pairs(path): return {}[path.name]", r"our-lab 1\.0 .* fails \(KeyError: 'garden'\)"),
        ("no_lab.pairs", PAIRS, "cannot be imported .*; set PYTHONPATH"),
        ("piars", PAIRS, "piars: is unknown; expected one of coco, .*, pairs, the dotted path"),
    ],
)
def test_a_broken_one_is_told_in_one_line(installed, garden, kind, text, says):
    installed("our-lab", OFFERS, {"our_lab.py": text})
    with pytest.raises(ValueError, match=says) as error:
        data.open_source(f"{kind}:{garden}")
    assert "\n" not in str(error.value) and len(data.open_source(f"folder:{garden}")) == 3


def test_two_distributions_are_named(installed, garden):
    installed("our-lab", OFFERS, {"our_lab.py": PAIRS})
    installed("their-lab", {GROUP: {"pairs": "their_lab:x"}}, {}, "2.0")
    with pytest.raises(ValueError, match=r"offered by their-lab 2\.0 .* and our-lab 1\.0 "):
        data.open_source(f"pairs:{garden}")


def test_a_folder_with_a_colon_in_its_name_is_a_folder(garden, monkeypatch):
    monkeypatch.chdir(garden.parent)
    garden.rename(garden.parent / "my_garden:2024")
    assert len(data.open_source("my_garden:2024")) == 3


def test_the_list(installed, capsys, garden):
    installed("our-lab", OFFERS | {"other.group": {"x": "y:z"}}, {"our_lab.py": PAIRS})
    assert main(["list", "--json"]) == 0
    listed = {item["name"]: item for item in json.loads(capsys.readouterr().out)}
    assert set(listed) == {*data.KINDS, "pairs"}
    assert listed["pairs"]["options"] == {"prefix": "''"} and listed["coco"]["options"] == {"images": "''"}
    assert listed["pairs"]["about"] == "A text file with a line for each image."
    assert main([]) == 0 and "pairs  (our-lab 1.0 our_lab:open_pairs sha256:" in capsys.readouterr().out
    assert main(["check", str(garden), "--kind", "pairs"]) == 0
    assert "pairs                 3, looked at 3" in capsys.readouterr().out
