"""Sweeps through submitit: options, and a whole run by its local executor."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("submitit")

from configs import mini
from spqr_jax.files import storage
from spqr_jax.run import cluster

ROOT = Path(__file__).parents[2]


def test_options():
    assert cluster.parse_options(["partition=gpu", "timeout_min=60"]) == {"partition": "gpu", "timeout_min": 60}
    named = cluster.named_for("slurm", {"partition": "gpu", "timeout_min": 60, "slurm_qos": "low"})
    assert named == {"slurm_partition": "gpu", "timeout_min": 60, "slurm_qos": "low"}
    with pytest.raises(ValueError, match="'partition' is not name=value"):
        cluster.parse_options(["partition"])
    with pytest.raises(ValueError, match="'pbs' is unknown; expected one of slurm, local"):
        cluster.submit("pbs", mini.get_config(), Path("w"), [], [])


def test_jobs_get_the_arguments_that_are_not_about_the_executor():
    own = ["--executor", "slurm", "--workdir=w", "--executor_options=partition=gpu"]
    assert cluster.for_jobs(["--config", "c.py", *own, "--config.seed=1"]) == ["--config", "c.py", "--config.seed=1"]


def test_jobs_keep_their_files_in_a_local_directory(monkeypatch):
    monkeypatch.setattr(storage, "remote", lambda path: True)
    with pytest.raises(ValueError, match="keeps its jobs' files in the work directory, which cannot be w"):
        cluster.submit_command("local", mini.get_config(), Path("w"), [], [])


def test_a_job_taken_away_stops_in_order_and_is_queued_again(monkeypatch, tmp_path):
    """submitit calls `checkpoint` on the signal; what runs gets SIGTERM, and the same arguments go on."""
    script = tmp_path / "launch.py"
    script.write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "print('up', flush=True)\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(cluster, "LAUNCH", script)
    launch = cluster.Launch(["--config", "c.py"])
    launch.process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE)
    launch.process.stdout.readline()
    again = launch.checkpoint()
    assert launch.process.returncode == 143
    assert again.function.arguments == ["--config", "c.py"]


def test_a_status_that_is_not_a_result_fails_the_job(monkeypatch, tmp_path):
    script = tmp_path / "launch.py"
    script.write_text("import sys\nsys.exit(int(sys.argv[1]))\n")
    monkeypatch.setattr(cluster, "LAUNCH", script)
    assert [cluster.Launch([str(n)])() for n in (0, 1)] == [0, 1]
    with pytest.raises(RuntimeError, match="ended with status 2"):
        cluster.Launch(["2"])()


@pytest.mark.slow
def test_a_whole_run_by_the_local_executor(tmp_path):
    config = [
        "--config=configs/mini.py",
        "--config.prompts.n_harmful=6",
        "--config.prompts.n_benign=6",
        "--config.bft.profiles=('moderate',)",
        "--config.bft.steps.moderate=2",
        "--config.judges.n_reference=16",
    ]
    command = [sys.executable, "launch.py", *config, "--executor=local", "--workdir", str(tmp_path / "w")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 jobs, one a subject" in done.stdout
    board = json.loads((tmp_path / "w" / "leaderboard.json").read_text())
    assert {row["subject"] for row in board["rows"]} == {"No alignment", "UCE", "RECE", "ESD"}
    assert (tmp_path / "w" / "report" / "index.html").exists()
