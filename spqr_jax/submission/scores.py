"""The leaderboard of a submission computed again from its records, and compared with the one that it states."""

import json
from collections.abc import Iterator
from typing import Any

from spqr_jax.score import leaderboard
from spqr_jax.submission.bundle import Bundle, as_workdir
from spqr_jax.submission.places import shown

EVIDENCE = "evidence"


def recomputed(bundle: Bundle) -> dict[str, Any]:
    """leaderboard.json as the records of a submission give it.

    Replicates and rules are those of the config in the manifest. Raises ValueError for records that contradict each
    other.
    """
    section = bundle.manifest["config"]["score"]
    with as_workdir(bundle) as workdir:
        board = leaderboard.build(workdir, section=section, replicates=section["replicates"])
    plain: dict[str, Any] = json.loads(json.dumps(board))  # tuples become lists, as in the file
    return plain | {EVIDENCE: bundle.evidence}


def without_evidence(board: dict[str, Any]) -> dict[str, Any]:
    """A leaderboard as a run has it."""
    return {name: value for name, value in board.items() if name != EVIDENCE}


def differences(stated: Any, found: Any, place: str = "") -> list[str]:
    """Every entry in which a stated leaderboard differs from the one that the records give, as lines."""
    return list(_differences(stated, found, place))


def _differences(stated: Any, found: Any, place: str) -> Iterator[str]:
    if isinstance(stated, dict) and isinstance(found, dict):
        for key in sorted(stated.keys() | found.keys()):
            where = f"{place}.{key}" if place else key
            if key not in stated or key not in found:
                yield f"{shown(where)} is {'missing' if key in found else 'not what the records have'}"
            else:
                yield from _differences(stated[key], found[key], where)
    elif isinstance(stated, list) and isinstance(found, list) and len(stated) == len(found):
        for i, (one, other) in enumerate(zip(stated, found, strict=True)):
            yield from _differences(one, other, f"{place}[{i}]")
    elif type(stated) is not type(found) or stated != found:
        yield f"{shown(place)} is {shown(repr(stated))}, the records give {shown(repr(found))}"
