"""One bundle as the board needs it: its verification, and for each of its rows what a joint ranking is made from."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from spqr_jax.board import conditions
from spqr_jax.board.conditions import Conditions
from spqr_jax.score import adherence
from spqr_jax.score import rules as rules_lib
from spqr_jax.score.cells import FinishedCell, complete_cells
from spqr_jax.score.reference import distance_to_reference
from spqr_jax.score.row import ResampledRow, row_of_cells
from spqr_jax.score.rules import Rules
from spqr_jax.score.stats import Draws
from spqr_jax.submission import bundle as bundle_lib
from spqr_jax.submission import division, evidence, places, verify
from spqr_jax.submission.bundle import Bundle
from spqr_jax.submission.places import Refused
from spqr_jax.submission.verify import Verification

DRAWS = Draws(2000, 0)  # of every table, whatever the submissions' own: ranks need replicates of the same draws
DIGITS = 12  # of an id, in texts


class Entry(NamedTuple):
    """A row of a submission.

    Attributes:
        anchor: its name in links, made of the submission's id and of the row's subject, profile and scenario.
        cells: their ids, which are hashes of all that decides a result.
        evidence: digest of its cells; the same results in two submissions are one line of a table.
        method, options: how its subject was made.
        stated: the row of the submission's own leaderboard.
        scored: its figures and replicates, with P under the ceiling. Its subject's name holds the submission's id.
        rules: of its score; `cohort` holds names as in `scored`.
    """

    anchor: str
    cells: tuple[str, ...]
    evidence: str
    method: str
    options: dict[str, Any]
    stated: dict[str, Any]
    conditions: Conditions
    scored: ResampledRow
    rules: Rules


class Submission(NamedTuple):
    """A bundle on the board.

    Attributes:
        directory: where it lies.
        manifest, leaderboard, files: its documents, and what its index says of its files; empty if not verified.
        reference: digest of the features of its reference images, "" without.
        entries: its rows; empty if not verified.
    """

    directory: Path
    verification: Verification
    manifest: dict[str, Any]
    leaderboard: dict[str, Any]
    files: dict[str, Any]
    reference: str
    entries: tuple[Entry, ...]

    @property
    def name(self) -> str:
        """The name of its directory."""
        return self.directory.name

    @property
    def id(self) -> str:
        """The id of the submission."""
        return self.verification.id


def read(directory: Path, pins: division.Pins | None = None) -> Submission:
    """Verify a bundle and prepare its rows. A bundle that fails is a submission without rows; nothing is raised."""
    found = verify.check(directory, pins=pins)
    if not found.verified:
        return refused(directory, found)
    try:
        bundle, index = bundle_lib.read(directory), bundle_lib.read_index(directory)
    except Refused as error:
        return refused(directory, found._replace(faults=error.faults))
    if bundle.id != found.id:
        return refused(directory, found._replace(faults=[f"{places.INDEX}: the bundle was changed while it was read"]))
    reference = "" if bundle.reference is None else evidence.digest_of_arrays(bundle.reference)
    documents = bundle.manifest, bundle.leaderboard, index["files"]
    return Submission(directory, found, *documents, reference, tuple(_entries(bundle)))


def refused(directory: Path, found: Verification) -> Submission:
    """A bundle that is not verified: nothing of it is shown but its faults."""
    return Submission(directory, found, {}, {}, {}, "", ())


def _entries(bundle: Bundle) -> Iterator[Entry]:
    """The rows of a verified bundle."""
    stated = {(r["subject"], r["profile"], r["scenario"]): r for r in bundle.leaderboard["rows"]}
    subjects = {s["name"]: s for s in bundle.manifest["config"]["subjects"]}
    by_name = {cell.name: cell for cell in bundle.cells}
    with bundle_lib.as_workdir(bundle) as workdir:
        cells = complete_cells(workdir)
        rules, scored = _scored(bundle, workdir, cells)
    for own, row in zip(cells, scored, strict=True):
        first = own[0]
        place = (first.subject, first.profile, first.scenario)
        subject = subjects[first.subject]
        yield Entry(
            anchor=f"r-{bundle.id[:DIGITS]}-{_digest(place)}",
            cells=tuple(cell.name for cell in own),
            evidence=_digest([_evidence(by_name[cell.name]) for cell in own]),
            method=subject["method"] if not subject["checkpoint"] else "checkpoint",
            options=subject["options"],
            stated=stated[place],
            conditions=conditions.of_row(bundle, by_name[first.name], rules),
            scored=row,
            rules=rules._replace(cohort=tuple(unique(name, bundle.id) for name in rules.cohort)),
        )


def _scored(bundle: Bundle, workdir: Path, cells: list[list[FinishedCell]]) -> tuple[Rules, list[ResampledRow]]:
    """The rules of a bundle's score, and its rows with replicates. Seeds of two submissions are independent draws."""
    _, protocol, backbone = rules_lib.followed(cell for row in cells for cell in row)
    rules = rules_lib.configured(rules_lib.of_protocol(protocol, backbone), bundle.manifest["config"]["score"])
    distance, notes = distance_to_reference(workdir, cells[0][0].judges.get("features"), bundle.id), list[str]()
    rows = [row_of_cells([_renamed(cell, bundle.id) for cell in row], distance, notes, DRAWS) for row in cells]
    named = rules._replace(ceiling=unique(rules.ceiling, bundle.id)) if _names_subject(rules.ceiling) else rules
    return rules, adherence.scaled(rows, named, protocol, notes)[0]


def unique(subject: str, id: str) -> str:
    """A name that no other submission's subject has."""
    return f"{subject} ({id[:DIGITS]})"


def _names_subject(ceiling: str) -> bool:
    try:
        float(ceiling)
    except ValueError:
        return ceiling != "none"
    return False


def _renamed(cell: FinishedCell, id: str) -> FinishedCell:
    name = unique(cell.subject, id)
    return cell._replace(subject=name, info=cell.info | {"subject": name})


def _evidence(cell: bundle_lib.BundledCell) -> Mapping[str, Any]:
    """What the figures of a cell are computed from. Its name in the records may differ where its results do not."""
    records = cell.records.drop_columns(["cell", "subject"])
    return {
        "records": evidence.digest_of_table(records),
        "features": evidence.digest_of_arrays(cell.features),
        "seed": cell.info["seed"],
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:DIGITS]
