"""No change of a bundle passes: 1,000 random ones, made as `mutations` tells."""

import fnmatch
import os
import time

import numpy as np
import pytest

from spqr_jax.submission import bundle as bundle_lib
from spqr_jax.submission import verify
from tests.submission import mutations

# What a sealed change may be to pass as another submission: docs/submissions.md lists it as believed.
BELIEVED = (
    ("manifest.json", "command"),
    ("manifest.json", "devices*"),
    ("manifest.json", "versions.*"),
    ("manifest.json", "config.report.*"),
    ("manifest.json", "config.mesh.*"),
    ("manifest.json", "config.judges.*"),
    ("manifest.json", "config.*.batch_size"),
    ("manifest.json", "config.bft.*"),
    ("cells/*/cell.json", "seconds*"),
    ("cells/*/cell.json", "rates*"),
    ("cells/*/cell.json", "finetune*"),
    ("cells/*/records.parquet", "judges, row *, harm.*"),
    ("cells/*/records.parquet", "clip_score, row *"),
    ("cells/*/drift.parquet", "verdict, row *"),
    ("cells/*/features.npz", "*"),
    ("reference_features.npz", "*"),
)


@pytest.fixture(autouse=True)
def unsynced(monkeypatch):
    """Thousands of small files need not survive a loss of power."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def is_believed(made: mutations.Change) -> bool:
    return any(fnmatch.fnmatch(made.file, file) and fnmatch.fnmatch(made.place, place) for file, place in BELIEVED)


def tried(source, tmp_path, n: int, seed: int) -> dict[str, list[mutations.Change]]:
    """n changes by what became of them: "found", "equal" (the same values in other bytes), or "another" submission."""
    read = bundle_lib.read(source)
    original = read.id
    outcomes: dict[str, list[mutations.Change]] = {"found": [], "equal": [], "another": []}
    for i in range(n):
        made = mutations.change(source, read, tmp_path / "changed", np.random.default_rng((seed, i)))
        found = verify.check(tmp_path / "changed")
        if not found.verified:
            assert all(line and "\n" not in line for line in found.faults), made
            outcomes["found"].append(made)
        elif bundle_lib.read(tmp_path / "changed").id == original:
            assert made.seal != "sealed" or made.place.endswith("moved"), made
            outcomes["equal"].append(made)
        else:
            outcomes["another"].append(made)
            assert not verify.check(tmp_path / "changed", id=original).verified, made
    return outcomes


def check(outcomes):
    passed = [made for made in outcomes["another"] if made.seal != "sealed"]
    assert not passed, passed
    assert not (wrong := [made for made in outcomes["another"] if not is_believed(made)]), wrong


def test_no_change_passes(made, tmp_path):
    check(tried(made / "bundle", tmp_path, 30, seed=1))


@pytest.mark.slow
def test_no_change_of_a_thousand_passes(made, tmp_path):
    start = time.time()
    outcomes = tried(made / "bundle", tmp_path, 1000, seed=2)
    seals = {k: {s: sum(m.seal == s for m in v) for s in mutations.SEALS} for k, v in outcomes.items()}
    print(f"\n{seals}, {time.time() - start:.0f} s")
    for name in ("equal", "another"):
        print(name, *outcomes[name], sep="\n  ")
    check(outcomes)
