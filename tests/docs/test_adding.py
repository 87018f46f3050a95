"""The recipes of docs/adding.md work: every marked block of the page is written or run exactly as it stands."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from judges import opening
from spqr_jax import backbones, methods
from spqr_jax import params as params_lib

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "adding.md").read_text(encoding="utf-8")
MARKED = re.compile(r"<!-- (run|shell|file: (?P<name>\S+)) -->\n```\w+\n(?P<code>.*?)```", re.DOTALL)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Another directory, whose files can be imported; what the page adds to the project is taken back afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setattr(backbones, "BACKBONES", backbones.BACKBONES)
    modules = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - modules:
        if str(tmp_path) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


def follow(title: str) -> dict[str, Any]:
    """Carry out the blocks of one section, in order. Returns the names that they defined."""
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    names: dict[str, Any] = {}
    blocks = list(MARKED.finditer(section))
    assert len(blocks) == section.count("<!--")
    for block in blocks:
        if block["name"]:
            Path(block["name"]).write_text(block["code"], encoding="utf-8")
        elif block[1] == "run":
            exec(block["code"], names)
        else:
            for line in block["code"].splitlines():
                command = line.replace("python ", f"{sys.executable} ", 1).replace("launch.py", str(ROOT / "launch.py"))
                done = subprocess.run(command.split(), capture_output=True, text=True)
                assert done.returncode == 0, done.stdout + done.stderr
                names.setdefault("printed", []).append(done.stdout)
    return names


def different(before: Any, after: Any) -> set[str]:
    """Paths of the leaves that differ."""
    new = params_lib.flatten(after)
    return {path for path, leaf in params_lib.flatten(before).items() if not np.array_equal(leaf, new[path])}


def test_a_method():
    names = follow("A method")
    changed = different(names["pipeline"].params, names["safer"].params)
    assert changed and all(".attn2." in path for path in changed)
    assert any("Mine x standard" in text for text in names["printed"])
    assert names["printed"][-1].endswith("my_method.align keeps to the contract.\n")
    method = methods.find("my_method.align")
    assert methods.options(method) == ("seed", "strength", "progress")
    names["METHOD"].check_backbone(names["pipeline"])


def test_a_judge(capsys):
    pytest.importorskip("onnx")
    names = follow("A judge")
    assert capsys.readouterr().out.startswith("['unsafe', 'safe']\n")
    by_class = opening.open_safety("dark.Dark")
    levels = np.stack([np.full((4, 4, 3), level, np.uint8) for level in (20, 230)])
    assert [record.verdict for record in by_class(levels)] == ["unsafe", "safe"]
    assert isinstance(names["judge"], opening.Judge) and isinstance(by_class, opening.Judge)


def test_a_backbone():
    names = follow("A backbone")
    assert names["images"].shape == (1, 16, 16, 3) and names["images"].dtype == np.uint8
    before, after = (names[name].params for name in ("pipeline", "tuned"))
    assert different(before, after) == {"toy.conv_in.kernel"}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
    with pytest.raises(ValueError, match=r"UCE needs the region 'key_value' of the denoiser, which Toy does not have"):
        names["TOY"].require("key_value", "UCE")


def test_a_scenario():
    names = follow("A scenario")
    assert "UCE" in names["printed"][-1] and "garden" in names["printed"][-1]
