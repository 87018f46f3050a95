"""Killed at any moment, the same command continues, and the result is the undisturbed run's to the byte."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spqr_jax.files import images

ROOT = Path(__file__).parent.parent.parent
SMALL = """
from spqr_jax.config import *

def get_config():
    return Config(
        subjects=(Subject("UCE", "uce"),),
        attacks=(
            Attack(
                "Inversion",
                "inversion",
                {"steps": 2, "images": 4, "batch_size": 2, "image_steps": 4, "image_guidance": 4.0},
                prompts=2,
            ),
        ),
        prompts=Prompts(n_harmful=6, n_benign=6),
        generation=Generation(steps=2, guidance=4.0, scheduler="dpmpp", batch_size=4),
        bft=BFT(
            profiles=("lite", "moderate"), samples=32, curriculum=(16, 32), steps=PerProfile(4, 4, 4), warmup_steps=1,
            checkpoint_every=1,
        ),
        judges=Judges(n_reference=16),
        score=Score(replicates=100),
    )
"""


def start(folder: Path, name: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "launch.py"), "--config", str(folder / "small.py")]
    log = (folder / f"{name}.log").open("ab")
    return subprocess.Popen([*command, "--workdir", str(folder / name)], cwd=ROOT, stdout=log, stderr=log)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("kill")
    (folder / "small.py").write_text(SMALL)
    started = time.time()
    assert start(folder, "undisturbed").wait() == 0
    (folder / "seconds").write_text(str(time.time() - started))
    return folder / "undisturbed"


def check_same(workdir: Path, undisturbed: Path) -> None:
    compared = 0
    for file in sorted(undisturbed.rglob("*")):
        same = ("leaderboard.json", "attacks.json", "adapter.safetensors", "found.npz")
        if file.suffix in (".png", ".parquet") or file.name in same:
            assert (workdir / file.relative_to(undisturbed)).read_bytes() == file.read_bytes(), file
            compared += 1
    assert compared > 50
    assert not list(workdir.rglob("*.damaged-*"))


def started_stage(workdir: Path, stage: str) -> bool:
    """Whether a run has something of a stage on disk."""
    pattern = {
        "align": "pipelines/*",
        "generate": "subjects/*/images/*/*.png",
        "finetune": "cells/*/training/*",
        "attack": "attacks/*/found.npz",
        "judge": "subjects/*/records.parquet*",
    }[stage]
    return any(workdir.glob(pattern))


def test_sigterm_exits_for_the_scheduler_and_the_same_command_continues(undisturbed):
    folder, name = undisturbed.parent, "terminated"
    process = start(folder, name)
    while not started_stage(folder / name, "finetune"):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) == 143
    assert not (folder / name / "leaderboard.json").exists()
    assert start(folder, name).wait() == 0
    check_same(folder / name, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["align", "generate", "finetune", "attack", "judge"])
def test_killed_in_a_stage(undisturbed, stage):
    folder, name = undisturbed.parent, f"killed-{stage}"
    process = start(folder, name)
    while not started_stage(folder / name, stage):
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert start(folder, name).wait() == 0
    check_same(folder / name, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_killed_at_ten_random_moments(undisturbed, seed):
    """Fifty kills in all, in whatever stage they fall; then the same command to the end."""
    folder, name = undisturbed.parent, f"random-{seed}"
    whole = float((folder / "seconds").read_text())
    moments = random.Random(seed)
    for _ in range(10):
        process = start(folder, name)
        try:
            process.wait(timeout=moments.uniform(0.2, 1.0) * whole)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    assert start(folder, name).wait() == 0
    check_same(folder / name, undisturbed)


@pytest.fixture
def small_disk(undisturbed):
    """A work directory with a file system of its own and hardly any space there; needs the right to mount."""
    place = undisturbed.parent / "full"
    place.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("a file system cannot be mounted here")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_the_same_command_continues(undisturbed, small_disk):
    folder, name = small_disk.parent, small_disk.name
    assert start(folder, name).wait() == 2
    log = (folder / f"{name}.log").read_text()
    assert "No space left" in log and "Traceback" not in log
    assert not list(small_disk.glob("cells/*/cell.json"))
    subprocess.run(["mount", "-o", "remount,size=1g", small_disk], check=True)
    assert start(folder, name).wait() == 0
    check_same(small_disk, undisturbed)


def test_damaged_files_are_named_set_aside_and_made_again(undisturbed):
    """In one cell a picture with a flipped byte and adapted weights cut short, in another truncated records."""
    folder, name = undisturbed.parent, "damaged"
    workdir = folder / name
    shutil.copytree(undisturbed, workdir)
    cell, other = sorted((workdir / "cells").iterdir())
    picture = sorted((cell / "images" / "after_benign").iterdir())[0]
    content = bytearray(picture.read_bytes())
    content[len(content) // 2] ^= 0xFF
    picture.unlink()
    picture.write_bytes(content)
    assert not images.intact(picture)
    (other / "records.parquet").write_bytes((other / "records.parquet").read_bytes()[:100])
    for file in (cell / "adapted").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    (cell / "cell.json").unlink()
    assert start(folder, name).wait() == 0
    aside = {path.name for path in workdir.rglob("*.damaged-*")}
    assert aside == {f"{picture.name}.damaged-1", "records.parquet.damaged-1", "adapted.damaged-1"}
    log = (folder / f"{name}.log").read_text()
    assert all(path in log for path in (picture.name, "records.parquet", "adapted"))
    for path in workdir.rglob("*.damaged-*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    check_same(workdir, undisturbed)
    assert json.loads((cell / "cell.json").read_text())["cell"] == cell.name
