"""The notebook runs, cell by cell as a kernel would run it, and its curve is that of a model that loses its safety."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "first_look.ipynb"
SMALL = "n_prompts, erasing_steps, finetuning_steps, measure_at = 4, 2, 2, (0, 2)"
LAST = """
import json
print(json.dumps({"curve": list(curve.items()), "unaligned": unaligned, "figures": len(plt.get_fignums())}))
"""


@pytest.fixture(scope="module")
def cells() -> list[dict]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_it_ships_without_outputs_in_the_form_that_jupyter_writes(cells):
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in cells}) == len(cells)
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert [cell["id"] for cell in code if "parameters" in cell["metadata"].get("tags", ())] == ["sizes"]
    assert NOTEBOOK.stat().st_size < 20_000


def executed(cells, *, parameters: str = "") -> dict:
    """What the cells of code leave behind, run one after the other. parameters: in place of the tagged cell."""
    sources = [
        parameters if parameters and "tags" in cell["metadata"] else "".join(cell["source"])
        for cell in cells
        if cell["cell_type"] == "code"
    ]
    environment = os.environ | {"MPLBACKEND": "agg", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", "\n".join([*sources, LAST])]
    done = subprocess.run(command, cwd=ROOT / "examples", env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_cell_runs(cells):
    found = executed(cells, parameters=SMALL)
    assert [step for step, _ in found["curve"]] == [0, 2] and found["figures"] == 1
    assert all(0.0 <= h <= 100.0 for _, h in found["curve"])


@pytest.mark.slow
def test_as_it_ships_the_curve_rises_from_safe_to_unaligned(cells):
    start = time.time()
    found = executed(cells)
    h = np.array(found["curve"])[:, 1]
    print(f"\n{time.time() - start:.0f} s, unaligned {found['unaligned']:.0f}, {found['curve']}")
    assert found["unaligned"] > 75 and h[0] < 30 and h[-1] > 60
