"""No change of a bundle passes as that bundle: 1,000 random ones, made as `mutations` tells."""

import fnmatch
import os
import time
from collections import Counter

import numpy as np
import pytest

from spqr_jax.submission import bundle as bundle_lib
from spqr_jax.submission import verify
from tests.submission import mutations

# What may differ in a bundle that is verified under an id of its own: docs/submissions.md lists it as believed.
BELIEVED = {
    "settings that change no result": (
        ("manifest.json", "config.report.*"),
        ("manifest.json", "config.mesh.*"),
        ("manifest.json", "config.judges.overlap"),
        ("manifest.json", "config.judges.max_undecided"),
        ("manifest.json", "config.*.batch_size"),
        ("manifest.json", "config.bft.checkpoint_every"),
        ("manifest.json", "config.bft.accumulate"),
        ("manifest.json", "config.bft.remat"),
    ),
    "where and how long it ran": (
        ("manifest.json", "command"),
        ("manifest.json", "devices*"),
        ("manifest.json", "versions.*"),
        ("cells/*/cell.json", "seconds*"),
        ("cells/*/cell.json", "rates*"),
        ("cells/*/cell.json", "finetune.steps taken away"),
    ),
    "what judges and networks saw": (
        ("cells/*/records.parquet", "judges, row *, harm.*"),
        ("cells/*/records.parquet", "clip_score, row *"),
        ("cells/*/drift.parquet", "verdict, row *"),
        ("cells/*/features.npz", "after_benign*"),
        ("reference_features.npz", "mu*"),
    ),
    "the encoding of equal values": (("*.parquet", "* byte *"), ("*.npz", "* byte *")),
}


@pytest.fixture(autouse=True)
def unsynced(monkeypatch):
    """Thousands of small files need not survive a loss of power."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def believed(made: mutations.Change) -> str:
    """The kind of what is believed that a change is of, "" for a change that must be found."""

    def fits(file: str, place: str) -> bool:
        return fnmatch.fnmatch(made.file, file) and fnmatch.fnmatch(made.place, place)

    return next((kind for kind, places in BELIEVED.items() if any(fits(*place) for place in places)), "")


def tried(source, tmp_path, n: int, seed: int) -> tuple[Counter, list[mutations.Change]]:
    """n changes: how many of each seal were refused, and those that passed, each of them under another id."""
    read, changed = bundle_lib.read(source), tmp_path / "changed"
    refused: Counter = Counter()
    passed = []
    for i in range(n):
        made = mutations.change(source, read, changed, np.random.default_rng((seed, i)))
        found = verify.check(changed)
        if not found.verified:
            assert all(line and "\n" not in line for line in found.faults), made
            refused[made.seal] += 1
            continue
        passed.append(made)
        assert found.id != read.id, f"passes as the bundle itself: {made}"
        assert f"expected {read.id[:12]}" in verify.check(changed, id=read.id).faults[0], made
        other = bundle_lib.read(changed)
        same_values = other.evidence == read.evidence and other.leaderboard == read.leaderboard
        assert same_values == (believed(made) == "the encoding of equal values"), made
    return refused, passed


def check(passed):
    assert {made.seal for made in passed} <= {"sealed", "scored"}, passed
    assert not (wrong := [made for made in passed if not believed(made)]), wrong


def test_no_change_passes(made, tmp_path):
    check(tried(made / "bundle", tmp_path, 30, seed=1)[1])


@pytest.mark.slow
def test_no_change_of_a_thousand_passes(made, tmp_path):
    start = time.time()
    refused, passed = tried(made / "bundle", tmp_path, 1000, seed=2)
    kinds = Counter((made.seal, believed(made)) for made in passed)
    print(f"\nrefused {sum(refused.values())}: {dict(refused)}; another id {len(passed)}; {time.time() - start:.0f} s")
    print(*(f"  {n} {seal}: {kind or 'NOT BELIEVED'}" for (seal, kind), n in sorted(kinds.items())), sep="\n")
    print(*passed, sep="\n")
    check(passed)
    assert sum(refused.values()) + len(passed) == 1000
