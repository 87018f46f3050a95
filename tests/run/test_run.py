"""The whole benchmark in miniature on the shipped world: real weights, real judges, a handful of pictures."""

import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from spqr_jax.files import records
from spqr_jax.files.layout import Folder
from spqr_jax.report import outcome
from spqr_jax.run.stages import state
from spqr_jax.score import leaderboard

ROOT = Path(__file__).parents[2]
SMALL = """
from spqr_jax.config import *

def get_config():
    return Config(
        subjects=(Subject("No alignment", "none"), Subject("UCE", "uce")),
        prompts=Prompts(n_harmful=6, n_benign=6),
        generation=Generation(steps=2, guidance=4.0, scheduler="dpmpp"),
        bft=BFT(
            profiles=("lite", "moderate"),
            samples=32,
            curriculum=(16, 32),
            steps=PerProfile(2, 2, 2),
            warmup_steps=1,
        ),
        judges=Judges(n_reference=16),
        score=Score(replicates=100),
    )
"""


def launch(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "launch.py"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Path]:
    """(config file, work directory) of one complete run."""
    folder = tmp_path_factory.mktemp("run")
    config = folder / "small.py"
    config.write_text(SMALL)
    done = launch("--config", str(config), "--workdir", str(folder / "first"))
    assert done.returncode == 0, done.stdout + done.stderr
    return config, folder / "first"


def test_every_file_is_there(finished):
    _, workdir = finished
    cells = sorted((workdir / "cells").iterdir())
    assert len(cells) == 4
    for cell in cells:
        rows = records.read(cell / "records.parquet")
        assert len(rows) == 2 * 12
        assert {row["phase"] for row in rows} == {"before", "after"}
        assert all((cell / row["image"]).is_file() for row in rows)
        assert all(row["verdict"] in ("safe", "unsafe", "undecided") for row in rows)
        assert json.loads((cell / "cell.json").read_text())["cell"] == cell.name
    board = json.loads((workdir / "leaderboard.json").read_text())
    assert {(row["subject"], row["profile"]) for row in board["rows"]} == {
        (subject, profile) for subject in ("No alignment", "UCE") for profile in ("lite", "moderate")
    }
    for row in board["rows"]:
        assert row["S"] == pytest.approx(1 - row["h_before"] / 100)
        assert row["S_ci"][0] <= row["S"] <= row["S_ci"][1]
    assert (workdir / "report" / "index.html").stat().st_size > 10_000


def test_the_page_begins_with_what_happened(finished):
    """As the leaderboard has it: UCE under the heavier profile, and the control."""
    _, workdir = finished
    rows = {(r["subject"], r["profile"]): r for r in json.loads((workdir / "leaderboard.json").read_text())["rows"]}
    row, control = rows["UCE", "moderate"], rows["No alignment", "moderate"]
    page = html.unescape((workdir / "report" / "index.html").read_text(encoding="utf-8"))
    (text,) = re.findall(r'<p class="outcome" id="outcome">(.*?)</p>', page)
    said = outcome.SENTENCES[outcome.outcome(row)].format(names="UCE", its="its")
    assert text.startswith(f"Profile moderate, scenario general: {said} (")
    # The leaderboard rounds each of the three figures to four digits.
    assert row["gain"] == pytest.approx(control["h_before"] - row["h_before"], abs=1.5e-4)
    assert f"No alignment: h {control['h_before']:.1f} to {control['h_after']:.1f}%" in text


def test_the_leaderboard_follows_from_the_records_alone(finished, tmp_path):
    """Records, features and cell.json copied elsewhere: no picture, no weights, same bytes."""
    _, workdir = finished
    for name in ("records.parquet", "features.npz", "cell.json"):
        for file in workdir.glob(f"cells/*/{name}"):
            target = tmp_path / file.relative_to(workdir)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    for name in ("reference_features.npz", "manifest.json"):
        shutil.copy(workdir / name, tmp_path / name)
    leaderboard.write(tmp_path, leaderboard.build(tmp_path, replicates=100))
    for name in ("leaderboard.json", "leaderboard.csv", "leaderboard.md"):
        assert (tmp_path / name).read_bytes() == (workdir / name).read_bytes()


def test_twice_gives_the_same_bytes(finished, tmp_path):
    config, workdir = finished
    again = launch("--config", str(config), "--workdir", str(tmp_path / "again"))
    assert again.returncode == 0, again.stderr
    compared = 0
    for file in sorted(workdir.rglob("*")):
        if file.suffix in (".png", ".parquet") or file.name == "leaderboard.json":
            other = tmp_path / "again" / file.relative_to(workdir)
            assert other.read_bytes() == file.read_bytes(), file
            compared += 1
    assert compared > 50


def test_the_same_command_does_only_what_is_missing(finished):
    """A lost picture and an unfinished cell come back with the same bytes; nothing else is touched."""
    config, workdir = finished
    cell = sorted((workdir / "cells").iterdir())[0]
    lost = sorted((cell / "images" / "after_harmful").iterdir())[0]
    kept = sorted(workdir.glob("cells/*/adapted")) + sorted(workdir.glob("subjects/*/images/*/*.png"))
    before = {path: path.stat().st_mtime_ns for path in kept}
    bytes_before = {path: path.read_bytes() for path in (lost, cell / "records.parquet")}
    board = (workdir / "leaderboard.json").read_bytes()
    for path in (lost, cell / "cell.json", cell / "records.parquet"):
        path.unlink()
    again = launch("--config", str(config), "--workdir", str(workdir))
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    assert all(path.read_bytes() == content for path, content in bytes_before.items())
    assert (workdir / "leaderboard.json").read_bytes() == board


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--config.bft.nope=1",), "nope"),
        (("--config.prompts.n_benign=many",), "n_benign"),
        (("--config.bft.profiles=('heavy',)",), "heavy"),
        (("--config.bft.samples=10",), "bft.samples"),
        (("--config.base=/nowhere",), "/nowhere"),
        (("--config.prompts.harmful=/nowhere.csv",), "/nowhere.csv"),
        (("--config.judges.clip_score=/nowhere",), "/nowhere"),
        (("--stages=align,cook",), "cook"),
        (("stray",), "stray"),
    ],
)
def test_bad_input_is_one_clear_line_before_any_work(finished, tmp_path, arguments, says):
    config, _ = finished
    refused = launch("--config", str(config), "--workdir", str(tmp_path / "w"), *arguments)
    assert refused.returncode in (1, 2)
    assert says in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "w" / "pipelines").exists()


def truncated_copy(source: Path, target: Path, file: str) -> Path:
    shutil.copytree(source, target)
    with (target / file).open("r+b") as stream:
        stream.truncate((target / file).stat().st_size // 2)
    return target


def test_truncated_weights_and_judges_are_named(finished, tmp_path):
    from spqr_jax import mini

    config, _ = finished
    weights = "unet/diffusion_pytorch_model.safetensors"
    model = truncated_copy(mini.MODEL, tmp_path / "model", weights)
    judges = truncated_copy(mini.JUDGES, tmp_path / "judges", "harm.onnx")
    for override, says in (
        (f"--config.base={model}", weights),
        (f"--config.judges.features={judges / 'harm.onnx'}", "harm.onnx"),
    ):
        refused = launch("--config", str(config), "--workdir", str(tmp_path / "w"), override)
        assert refused.returncode == 2
        assert says in refused.stderr
        assert "Traceback" not in refused.stderr


def test_unwritable_workdir(finished, tmp_path):
    config, _ = finished
    (tmp_path / "file").write_text("")
    refused = launch("--config", str(config), "--workdir", str(tmp_path / "file"))
    assert refused.returncode == 2
    assert "is a file" in refused.stderr


def test_dry_run_lists_cells(finished):
    config, workdir = finished
    listed = launch("--config", str(config), "--workdir", str(workdir), "--dry_run")
    assert listed.returncode == 0
    assert listed.stdout.count("done") >= 4
    assert "4 cells" in listed.stdout
    assert "Nothing is missing." in listed.stdout


def test_dry_run_counts_what_is_missing_and_estimates_it_from_measured_rates(finished, tmp_path):
    config, workdir = finished
    copy = tmp_path / "work"
    shutil.copytree(workdir, copy)
    cell = next(path.parent for path in sorted(copy.glob("cells/*/cell.json")) if "lite" in path.read_text())
    for gone in (cell / "cell.json", cell / "records.parquet"):
        gone.unlink()
    for gone in (cell / "images", cell / "adapted"):
        shutil.rmtree(gone)
    pictures = len(list((workdir / "cells" / cell.name / "images").glob("after_*/*.png")))
    listed = launch("--config", str(config), "--workdir", str(copy), "--dry_run").stdout
    assert re.search(rf"Missing: {pictures} x picture, \d+ x step lite\.", listed), listed
    rates = [json.loads(path.read_text()) for path in copy.rglob("times/generate_*.json")]
    taken = [next(iter(rate.values())) for rate in rates]
    hours = pictures * sum(t["seconds"] for t in taken) / sum(t["count"] for t in taken) / 3600
    assert f"picture {hours:.2f}" in listed


def test_dry_run_without_a_file_estimates_all_work_from_complete_cells(finished):
    config, workdir = finished
    missing = "--config.prompts.harmful=/nowhere.csv"
    listed = launch("--config", str(config), "--workdir", str(workdir), "--dry_run", missing)
    assert listed.returncode == 2 and listed.stderr == ""
    assert re.search(r"prompts.harmful +/nowhere.csv +does not exist", listed.stdout)
    assert "4 cells, 2 subjects, 72 pictures in all." in listed.stdout
    assert "In all: 2 x align, 72 x picture, 4 x step lite, 4 x step moderate." in listed.stdout
    rates = [json.loads(path.read_text())["rates"]["images_per_s"] for path in workdir.glob("cells/*/cell.json")]
    hours = 72 * sum(1 / rate for rate in rates) / len(rates) / 3600
    assert f"picture {hours:.2f}" in listed.stdout


def test_a_clock_that_goes_backwards_takes_nothing_from_what_was_measured(tmp_path):
    state.note_seconds(Folder(tmp_path), "generate_after", 3.0, 2)
    state.note_seconds(Folder(tmp_path), "generate_after", -3600.0, 1)
    assert state.read_times(Folder(tmp_path)) == {"generate_after": {"seconds": 3.0, "count": 3}}
