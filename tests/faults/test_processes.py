"""Several processes over one mesh, on loopback: the same pictures, weights and records as one process, and a death that
ends them all and loses nothing."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from spqr_jax import params as params_lib
from spqr_jax.files import checkpoint, images, records

ROOT = Path(__file__).parent.parent.parent
SMALL = """
from spqr_jax.config import *

def get_config():
    return Config(
        subjects=(Subject("UCE", "uce"),),
        prompts=Prompts(n_harmful=6, n_benign=6),
        generation=Generation(steps=2, guidance=4.0, scheduler="dpmpp", batch_size=4),
        bft=BFT(
            profiles=("moderate",), samples=32, curriculum=(16, 32), steps=PerProfile(2, 3, 2), warmup_steps=1,
            eval_at=(2,), eval_prompts=4,
        ),
        judges=Judges(n_reference=16),
        score=Score(replicates=100),
    )
"""


def start(folder: Path, name: str, count: int) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(ROOT / "launch.py"), "--config", str(folder / "small.py")]
    command += ["--workdir", str(folder / name)]
    among = (
        [[]]
        if count == 1
        else [
            ["--coordinator", f"localhost:{port}", "--process_count", str(count), "--process_index", str(i)]
            for i in range(count)
        ]
    )
    return [
        subprocess.Popen(
            [*command, *extra], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=(folder / f"{name}{i}.log").open("ab")
        )
        for i, extra in enumerate(among)
    ]


def finished(folder: Path, name: str, count: int) -> Path:
    for i, process in enumerate(start(folder, name, count)):
        assert process.wait(timeout=400) == 0, (folder / f"{name}{i}.log").read_text(errors="replace")[-2000:]
    return folder / name


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    (folder / "small.py").write_text(SMALL)
    return finished(folder, "alone", 1)


def check_same(workdir: Path, alone: Path) -> None:
    """Cells have the same names; pictures are within one grey level, fine-tuned weights within 1e-6."""
    cells = sorted(p.relative_to(alone) for p in alone.glob("cells/*"))
    assert cells and cells == sorted(p.relative_to(workdir) for p in workdir.glob("cells/*"))
    pictures = sorted(p.relative_to(alone) for p in alone.glob("*/*/images/*/*.png"))
    assert len(pictures) >= 24
    ours, theirs = (images.read([root / p for p in pictures]).astype(int) for root in (workdir, alone))
    assert np.abs(ours - theirs).max() <= 1
    for cell in cells:
        ours, theirs = (params_lib.flatten(checkpoint.load(root / cell / "adapted")) for root in (workdir, alone))
        assert ours.keys() == theirs.keys()
        assert max(np.abs(ours[path] - theirs[path]).max() for path in ours) <= 1e-6
        rows = [records.read(root / cell / "records.parquet") for root in (workdir, alone)]
        assert [(r["image"], r["verdict"]) for r in rows[0]] == [(r["image"], r["verdict"]) for r in rows[1]]
        assert (workdir / cell / "drift.parquet").exists()
    assert (workdir / "leaderboard.json").exists() and (workdir / "report" / "index.html").exists()


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_make_what_one_makes(alone, count):
    check_same(finished(alone.parent, f"of{count}", count), alone)


@pytest.mark.slow
def test_the_death_of_one_ends_all_and_the_same_command_continues(alone):
    processes = start(alone.parent, "killed", 2)
    until = time.time() + 300
    while not list((alone.parent / "killed").glob("subjects/*/images/*/*.png")):
        assert time.time() < until and all(p.poll() is None for p in processes)
        time.sleep(0.2)
    processes[1].send_signal(signal.SIGKILL)
    died = time.time()
    assert processes[0].wait(timeout=120) != 0
    assert time.time() - died < 60
    check_same(finished(alone.parent, "killed", 2), alone)


def test_one_of_many_is_not_silently_alone(alone, tmp_path):
    command = [sys.executable, str(ROOT / "launch.py"), "--config", str(alone.parent / "small.py")]
    refused = subprocess.run(
        [*command, "--workdir", str(tmp_path / "w")],
        env=os.environ | {"SLURM_NTASKS": "4"},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert refused.returncode == 2 and "SLURM_NTASKS" in refused.stderr and "--distributed" in refused.stderr
    assert not (tmp_path / "w").exists()
