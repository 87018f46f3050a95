"""Bundles of a small board, which no test changes."""

import shutil
from pathlib import Path

import pytest

from spqr_jax.board import site
from spqr_jax.submission import bundle as bundle_lib
from spqr_jax.submission import pack
from tests.board import bundles

SCRIPT = "<script>alert(1)</script>"
NASTY = 'Quote" onclick="alert(2)'


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """A folder with runs and bundles: a and b of one table, c with what a has and more, `apart`, `nasty`, `changed`."""
    folder = tmp_path_factory.mktemp("board")
    bundles.bundle(folder, "a", ("No alignment", "UCE", "ESD"), draw=1)
    bundles.bundle(folder, "b", ("RECE", "Mine"), draw=2, error=1e-6)
    bundles.bundle(folder, "apart", ("RECE",), draw=3, reference=9)
    made = bundles.bundle(folder, "nasty", (NASTY, "Two"), draw=4, config={"profiles": ("lite", "standard")})
    manifest = bundle_lib.read(made).manifest | {
        "command": f"python {SCRIPT} \u202egnp.exe",
        "extra": {"x": SCRIPT},
        "versions": {},
    }
    shutil.rmtree(made)
    packed = pack.of_run(folder / "runs" / "nasty")._replace(manifest=manifest)
    packed.leaderboard["evidence"] = packed.evidence
    bundle_lib.write(packed, made)
    changed = folder / "bundles" / "<img src=x onerror=alert(3)>"
    shutil.copytree(folder / "bundles" / "a", changed)
    text = (changed / "leaderboard.json").read_text(encoding="utf-8")
    (changed / "leaderboard.json").write_text(text.replace("0.5", "0.6", 1), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def board(made):
    """The board of all of them, in `made`/site."""
    return site.write([made / "bundles"], made / "site", cache=made / "cache", papers=True)
