"""The whole check, cheapest first: `python tests` from the root of the repository; extra arguments go to pytest."""

import subprocess
import sys

SOURCES = ["spqr_jax", "judges", "convert", "configs", "benchmarks", "examples", "tests", "launch.py"]
CHECKS = (
    ["ruff", "check", *SOURCES],
    ["ruff", "format", "--check", *SOURCES],
    ["mypy", "spqr_jax", "judges", "convert", "configs", "launch.py"],
    ["pytest", "-n", "2", "--dist", "loadscope", "-m", "not slow", *sys.argv[1:]],
)

for check in CHECKS:
    print("$", *check, flush=True)
    if status := subprocess.run([sys.executable, "-m", *check]).returncode:
        sys.exit(status)
