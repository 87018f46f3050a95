"""The benchmark of an accelerator, whole on a CPU at its smallest size."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import accelerator
from benchmarks.accelerator import SIZES, Bench
from benchmarks.side_by_side import Prepared, Side

ROOT = Path(__file__).parents[2]


def broken() -> Prepared:
    return Prepared({"sample": lambda: 1 / 0}, {})


def bench(tmp_path, size=SIZES["tiny"]):
    return Bench(size, tmp_path, tmp_path, "NVIDIA H100 80GB HBM3", 989e12, "")


@pytest.mark.slow
def test_the_smallest_size_runs_whole_on_a_cpu_and_is_appended(tmp_path):
    page = tmp_path / "performance.md"
    page.write_text("# Performance\n")
    command = [sys.executable, "-m", "benchmarks.accelerator", "--size", "tiny", "--append", str(page)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert text.startswith("# Performance\n\n### cpu, ") and text.endswith(f"\n{done.stdout}")
    for table in ("Attention", "Emoji world on the device against the CPU", "Sampling", "Fine-tuning", "Judges"):
        assert f"\n{table}:\n" in text
    assert "not measured" not in text and "failed" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    identical = next(row for row in rows if row.startswith("| 4 | 4 | 0 |"))  # one CPU draws what the other draws
    assert "0.000%" in identical
    assert any(re.match(r"\| 64 x 7, 2 x 8 \|", row) for row in rows)


def test_a_measurement_that_fails_or_comes_too_late_says_so(tmp_path, monkeypatch):
    row = accelerator.speed(bench(tmp_path), Side(broken), "sample", 1, "images/s", 0)
    assert row == {"images/s": "failed: ZeroDivisionError: division by zero"}

    def fails(_):
        raise RuntimeError("long story\nout of memory")

    monkeypatch.setattr(accelerator, "measurements", lambda size: iter([("A", fails), ("B", fails)]))
    assert accelerator.measure(bench(tmp_path), time.monotonic() + 60)["A"] == [{"not measured": "out of memory"}]
    late = accelerator.measure(bench(tmp_path), time.monotonic() - 1)
    assert late["B"] == [{"not measured": "the time was over; --minutes gives more"}]


def test_share_of_the_peak_is_work_over_time_over_peak(tmp_path, monkeypatch):
    timed = Side(accelerator_sample)
    row = accelerator.speed(bench(tmp_path), timed, "sample", 32, "images/s", 32 * accelerator.IMAGE_FLOP)
    assert row["images/s"] == pytest.approx(32 / 5)
    assert row["share of the peak"] == "54.7%"  # 32 x 84.5 TFLOP in 5 s, of 989 TFLOP/s


def accelerator_sample() -> Prepared:
    from benchmarks.side_by_side import Timed

    return Prepared({"sample": lambda: Timed(5.0, [])}, {})


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312), ("cpu", 0)],
)
def test_peaks_by_name(name, peak):
    assert accelerator.peak_of(name) == peak
