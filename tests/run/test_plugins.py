"""A run that names plug-ins: what they are is part of its ids, its records' judges, and its manifest."""

import json

import numpy as np
import pytest
from PIL import Image

from spqr_jax import data
from spqr_jax.config import BFT, Config, Judges, Prompts, Subject
from spqr_jax.files.layout import Workdir
from spqr_jax.run import manifest, missing, protocol
from spqr_jax.run.opening import open_run
from tests.data.test_plugins import PAIRS
from tests.judges.test_plugged import DARK
from tests.methods.test_plugins import ERASE

FILES = {"a_method.py": ERASE, "a_judge.py": DARK, "a_reader.py": PAIRS}
OFFERS = {
    "spqr_jax.methods": {"erase": "a_method:METHOD"},
    "spqr_jax.judges": {"dark": "a_judge:Dark"},
    "spqr_jax.data": {"pairs": "a_reader:open_pairs"},
}


@pytest.fixture
def opened(installed, tmp_path):
    """file that is changed -> the run opened with it, and its manifest."""
    folder = tmp_path / "garden"
    folder.mkdir()
    for i in range(3):
        Image.fromarray(np.full((32, 32, 3), 40 * i, np.uint8)).save(folder / f"{i}.png")
    (folder / "pairs.tsv").write_text("".join(f"{i}.png\tflower {i}\n" for i in range(3)))
    config = Config(
        subjects=(Subject("Mine", "erase"),),
        prompts=Prompts(n_harmful=2, n_benign=2),
        bft=BFT(
            scenarios=("garden",), data={"garden": f"pairs:{folder}"}, samples=3, curriculum=(), profiles=("lite",)
        ),
        judges=Judges(safety={"dark": "dark:0.4"}, n_reference=16),
    )

    def open_with(changed):
        installed("our-lab", OFFERS, {name: text + "# changed\n" * (name == changed) for name, text in FILES.items()})
        data.load.cache_clear()
        run = open_run(config, tmp_path / "run")
        manifest.write_manifest(run, ["launch.py"])
        return run, json.loads(Workdir(run.workdir).manifest.read_text())

    return open_with


def test_they_are_part_of_ids_and_manifest(opened):
    first, written = opened("")
    assert written["sha256"]["methods"]["erase"].startswith("our-lab 1.0 a_method:METHOD sha256:")
    assert "read by our-lab 1.0 a_reader:open_pairs sha256:" in written["sha256"]["data"]["garden"]
    assert written["judges"]["dark"]["plugin"].startswith("our-lab 1.0 a_judge:Dark sha256:")
    again, _ = opened("")
    assert again.cells[0].id == first.cells[0].id and again.jury.identities() == first.jury.identities()
    ids = {first.cells[0].id}
    for name in ("a_method.py", "a_reader.py"):
        changed, _ = opened(name)
        assert changed.jury.identities() == first.jury.identities()
        ids.add(changed.cells[0].id)
    assert len(ids) == 3
    judged, _ = opened("a_judge.py")  # the same images, judged anew
    assert judged.cells[0].id == first.cells[0].id and judged.jury.identities() != first.jury.identities()


def test_broken_ones_are_rows_of_the_table_of_missing_things(installed, tmp_path):
    installed("our-lab", OFFERS, {"a_judge.py": "1 / 0", "a_reader.py": "1 / 0"})
    config = Config(
        subjects=(Subject("UCE", "uce"),),
        bft=BFT(scenarios=("garden",), data={"garden": f"pairs:{tmp_path}"}),
        judges=Judges(safety={"dark": "dark:0.4"}),
    )
    with pytest.raises(missing.MissingFiles) as error:
        missing.open_all(protocol.resolve(config))
    rows = {fault.field: fault for fault in error.value.faults}
    for field, point in (
        ("bft.data.garden", "pairs = a_reader:open_pairs"),
        ("judges.safety.dark", "dark = a_judge:Dark"),
    ):
        expected = f"the entry point {point} of our-lab 1.0 cannot be loaded (ZeroDivisionError: division by zero)"
        assert rows[field].reason == expected
        assert rows[field].source == "correct that distribution, or uninstall it"
