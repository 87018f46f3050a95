"""docs/board.md: its five commands lead to a verified line on a board, and its workflow runs."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from spqr_jax.report.__main__ import main
from tests.board.test_pages import Page
from tests.examples.test_my_method import EXAMPLE, SMALL

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "board.md").read_text(encoding="utf-8")
WORKFLOW = ROOT / "docs" / "board_workflow.yml"
OFFLINE = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "-q"]


def commands() -> list[str]:
    """The block of the page that is marked as one to run."""
    return re.search(r"<!-- shell -->\n```bash\n(.*?)```", PAGE, re.DOTALL)[1].splitlines()


def follow(folder: Path, config: str) -> None:
    """Run the commands in a folder with links to the files of the repository, and pip without a network."""
    installed = folder / "installed"
    shutil.copytree(EXAMPLE, folder / "examples" / "my_method")
    (folder / "launch.py").symlink_to(ROOT / "launch.py")
    environment = os.environ | {"PYTHONPATH": f"{installed}:{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"}
    for line in commands():
        words = shlex.split(line.replace("examples/my_method/config.py", config))
        if words[0] == "pip":
            words = ["python", "-m", "pip", words[1], *OFFLINE, "--target", str(installed), *words[2:]]
        assert words[0] == "python"
        done = subprocess.run([sys.executable, *words[1:]], cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"


def lines(folder: Path) -> list[str]:
    """The lines of the board's tables."""
    rows = Page(folder / "site" / "index.html").all("tr")
    return [text for attributes, text in rows if attributes.get("id", "").startswith("r-")]


def check(folder: Path, subjects: int) -> None:
    found = lines(folder)
    assert len(found) == subjects and sum(line.startswith("Mine my_method") for line in found) == 1
    pages = list((folder / "site" / "submissions").glob("*.html"))
    assert len(pages) == 1
    text = " ".join(text for _, text in Page(pages[0]).all("main"))
    assert "verified" in text and "my-method 0.1.0 my_method:METHOD sha256:" in text


def test_five_commands_lead_to_a_verified_line(tmp_path):
    """With fewer images than the config of the example."""
    assert len(commands()) == 5
    (tmp_path / "small.py").write_text(SMALL.format(config=EXAMPLE / "config.py"), encoding="utf-8")
    follow(tmp_path, "small.py")
    check(tmp_path, 2)


@pytest.mark.slow
def test_five_commands_as_they_stand(tmp_path):
    follow(tmp_path, "examples/my_method/config.py")
    check(tmp_path, 3)


def test_the_workflow_verifies_and_fails_for_a_bundle_that_fails(made, tmp_path, monkeypatch, capsys):
    """Its own command, in a repository with bundles."""
    workflow = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))
    steps = workflow["jobs"]["verify"]["steps"]
    runs = [step["run"] for step in steps if "spqr_jax" in step.get("run", "")]
    assert len(runs) == 1 and runs[0].startswith("python -m spqr_jax.report ")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "bundles" / "a", tmp_path / "bundles" / "a")
    assert main(shlex.split(runs[0])[3:]) == 0 and len(lines(tmp_path)) == 3
    shutil.copytree(made / "bundles" / "<img src=x onerror=alert(3)>", tmp_path / "bundles" / "z")
    assert main(shlex.split(runs[0])[3:]) == 1
    assert "z: leaderboard.json" in capsys.readouterr().out


def test_the_workflow_gives_strangers_no_rights():
    text = WORKFLOW.read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    triggers = workflow[True]  # "on" is a boolean in YAML 1.1
    assert "pull_request" in triggers and "pull_request_target" not in triggers
    assert workflow["permissions"] == {"contents": "read"} and "secrets." not in text
    assert workflow["jobs"]["publish"]["if"] == "github.event_name != 'pull_request'"
    assert "github.event.pull_request.head" not in text  # code comes from the base, bundles from the merge
