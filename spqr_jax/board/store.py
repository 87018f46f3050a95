"""What was found out about a bundle, kept by a hash of its bytes, so that a board of hundreds is rebuilt in seconds.

An entry is found again only for the same bytes, read by the same code with the same pins. Entries are JSON and arrays;
nothing in them is executed.
"""

import functools
import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

import judges
import spqr_jax
from spqr_jax.board.conditions import Conditions
from spqr_jax.board.submissions import Entry, Submission, read, refused
from spqr_jax.files import storage
from spqr_jax.score.row import ResampledRow
from spqr_jax.score.rules import Rules
from spqr_jax.score.seeds import SeedSpread
from spqr_jax.score.stats import PairedShares, Totals
from spqr_jax.submission import division, places
from spqr_jax.submission.places import Refused
from spqr_jax.submission.verify import Verification

Arrays = dict[str, np.ndarray]
SOURCES = tuple(Path(package.__file__ or "").parent for package in (spqr_jax, judges))


def submission(directory: Path, cache: Path | None, pins: division.Pins | None = None) -> Submission:
    """The submission in a directory: from the cache, or verified now and kept there.

    One bundle cannot stop a board: whatever error it causes, it is a submission that is not verified.
    """
    try:
        return _submission(directory, cache, pins)
    except Exception as error:
        fault = f"cannot be verified: {type(error).__name__}: {places.shown(str(error))}"
        return refused(directory, Verification("", [fault]))


def _submission(directory: Path, cache: Path | None, pins: division.Pins | None) -> Submission:
    key = _key(directory, pins) if cache is not None else None
    if cache is None or key is None:
        return read(directory, pins)
    known = _loaded(cache, key)
    if known is None:
        known = read(directory, pins)
        if key == _key(directory, pins):
            _keep(cache, key, known)
    return known._replace(directory=directory)


def _key(directory: Path, pins: division.Pins | None) -> str | None:
    """Hash of the bytes of a bundle, the code and the pins; None for a directory that is refused at first sight."""
    total = hashlib.sha256(json.dumps([_code(), pins], sort_keys=True).encode())
    try:
        for name in sorted(places.listed(directory)):
            total.update(json.dumps([name, hashlib.sha256(places.content(directory, name)).hexdigest()]).encode())
    except (Refused, OSError):
        return None
    return total.hexdigest()


@functools.cache
def _code() -> str:
    """Hash of the code that verifies and scores, which is most of the package, and of the pins and schemas with it."""
    files = sorted(file for folder in SOURCES for file in folder.rglob("*.py"))
    files += sorted((Path(spqr_jax.__file__).parent / "submission").rglob("*.json"))
    texts = [[file.name, hashlib.sha256(file.read_bytes()).hexdigest()] for file in files]
    return hashlib.sha256(json.dumps([spqr_jax.__version__, texts]).encode()).hexdigest()


# Entries as JSON and arrays


def _keep(cache: Path, key: str, kept: Submission) -> None:
    """The arrays first: an entry with its JSON is whole."""
    arrays: Arrays = {}
    entries = [_as_json(entry, f"{i}.", arrays) for i, entry in enumerate(kept.entries)]
    document = {"verification": kept.verification._asdict(), "entries": entries}
    document |= {name: getattr(kept, name) for name in ("manifest", "leaderboard", "files", "reference")}
    storage.write_npz(cache / f"{key}.npz", **arrays)
    storage.write_text(cache / f"{key}.json", json.dumps(document, ensure_ascii=False))


def _loaded(cache: Path, key: str) -> Submission | None:
    """None where nothing is kept, or what is kept cannot be read."""
    try:
        document = json.loads((cache / f"{key}.json").read_text(encoding="utf-8"))
        arrays = storage.read_npz(cache / f"{key}.npz")
        entries = tuple(_entry(kept, f"{i}.", arrays) for i, kept in enumerate(document.pop("entries")))
        stated = document.pop("verification")
        found = Verification(**stated | {name: tuple(stated[name]) for name in ("reasons", "remarks")})
        return Submission(directory=cache, verification=found, entries=entries, **document)
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None


def _as_json(entry: Entry, at: str, arrays: Arrays) -> dict[str, Any]:
    """An entry without its arrays, which are added to `arrays` under names that begin with `at`."""
    scored = entry.scored
    found = {"drift": scored.drift, "unsafe": np.stack([part for totals in scored.unsafe for part in totals])}
    found |= {} if scored.shares is None else {"shares": np.stack(scored.shares)}
    found |= {} if scored.seeds is None else {"seeds": np.append(scored.seeds.values, scored.seeds.noise)}
    found |= {name: own for name in ("deviations", "P", "fid") if (own := getattr(scored, name)) is not None}
    arrays |= {at + name: array for name, array in found.items()}
    return entry._asdict() | {
        "conditions": entry.conditions._asdict(),
        "rules": entry.rules._asdict(),
        "scored": {name: getattr(scored, name) for name in ("row", "name", "harmful", "benign")},
    }


def _entry(kept: dict[str, Any], at: str, arrays: Arrays) -> Entry:
    scored, rules = kept["scored"], kept["rules"]
    own = {name: arrays.get(at + name) for name in ("shares", "seeds", "deviations", "P", "fid")}
    shares, seeds, unsafe = own.pop("shares"), own.pop("seeds"), arrays[at + "unsafe"]
    row = ResampledRow(
        row=scored["row"],
        name=scored["name"],
        harmful=tuple(map(tuple, scored["harmful"])),
        benign=tuple(map(tuple, scored["benign"])),
        drift=arrays[at + "drift"],
        unsafe=(Totals(*unsafe[:2]), Totals(*unsafe[2:])),
        shares=None if shares is None else PairedShares(*shares),
        seeds=None if seeds is None else SeedSpread(seeds[:-1], float(seeds[-1])),
        before={},  # only drift curves read it, and they are in the row
        **own,
    )
    bounds = rules["fid_bounds"]
    rules |= {"weights": tuple(rules["weights"]), "cohort": tuple(rules["cohort"])}
    rules |= {"fid_bounds": None if bounds is None else tuple(bounds)}
    read = {"conditions": Conditions(**kept["conditions"]), "rules": Rules(**rules), "scored": row}
    return Entry(**kept | read | {"cells": tuple(kept["cells"])})
