"""The example package of docs/adding.md: installed by pip, listed, checked, and run as a subject of a benchmark."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "my_method"
# The smallest run: the config of the example, with few images, fewer steps and one subject beside the method.
SMALL = """
import dataclasses
import importlib.util

from spqr_jax.config import BFT, Generation, Judges, PerProfile, Prompts, Score

def get_config():
    spec = importlib.util.spec_from_file_location("example_config", "{config}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    example = module.get_config()
    return dataclasses.replace(
        example,
        subjects=(example.subjects[0], example.subjects[-1]),
        prompts=Prompts(n_harmful=4, n_benign=4),
        generation=Generation(steps=2, guidance=4.0, scheduler="dpmpp"),
        bft=BFT(profiles=("lite",), samples=16, curriculum=(16,), steps=PerProfile(1, 1, 1), warmup_steps=1),
        judges=Judges(n_reference=16),
        score=Score(replicates=100),
    )
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """The environment in which the package is installed, in a folder of its own."""
    folder = tmp_path_factory.mktemp("installed")
    source = shutil.copytree(EXAMPLE, folder / "source")  # pip builds in the folder that it is given
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "-q"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", folder / "site", source]
    subprocess.run(command, check=True, capture_output=True)
    return os.environ | {"PYTHONPATH": f"{folder / 'site'}:{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"}


def command(environment, *arguments: str) -> str:
    """What a command prints. It must succeed."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_small():
    """Some forty lines of code; what a reader must write is the method and seven lines of metadata."""
    code = [line for line in (EXAMPLE / "my_method.py").read_text().splitlines() if line.strip()]
    assert len(code) <= 40


def test_it_is_listed(environment):
    listed = json.loads(command(environment, "-m", "spqr_jax.methods", "list", "my_method", "--json"))
    assert listed[0]["options"] == {"seed": "0", "strength": "1.0", "progress": "False"}
    assert re.fullmatch(r"my-method 0\.1\.0 my_method:METHOD sha256:[0-9a-f]{64}", listed[0]["origin"])


def test_it_keeps_to_the_contract_by_its_own_test(environment):
    told = command(environment, "-m", "pytest", "-n", "0", "-vv", "-p", "no:cacheprovider", str(EXAMPLE))
    assert "1 passed" in told


def test_it_is_a_subject_of_a_run(environment, tmp_path):
    config, workdir = tmp_path / "small.py", tmp_path / "run"
    config.write_text(SMALL.format(config=EXAMPLE / "config.py"))
    command(environment, "launch.py", "--config", str(config), "--workdir", str(workdir))
    manifest = json.loads((workdir / "manifest.json").read_text())
    assert manifest["sha256"]["methods"]["my_method"].startswith("my-method 0.1.0 my_method:METHOD sha256:")
    board = json.loads((workdir / "leaderboard.json").read_text())
    assert {row["subject"] for row in board["rows"]} == {"No alignment", "Mine"}
    notes = [json.loads(path.read_text()) for path in workdir.rglob("*.json") if path.parent.parent.name == "pipelines"]
    changed = [note["changed"] for note in notes if note.get("method") == "my_method"]
    assert changed == [["unet"]]


def test_its_own_config_is_opened_by_a_dry_run(environment, tmp_path):
    told = command(
        environment, "launch.py", "--config", str(EXAMPLE / "config.py"), "--workdir", str(tmp_path), "--dry_run"
    )
    assert "Mine x lite" in told
