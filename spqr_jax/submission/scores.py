"""The leaderboard of a submission computed again from its records, and compared with the one that it states."""

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from spqr_jax.score import leaderboard
from spqr_jax.score.row import GAIN_FIGURES
from spqr_jax.submission.bundle import Bundle, as_workdir
from spqr_jax.submission.places import shown

EVIDENCE = "evidence"
LATER = tuple(key for figure in GAIN_FIGURES for key in (figure, f"{figure}_ci"))  # rows had none of them at first
FROM_FEATURES = re.compile(r"(^|\.)(d?fid|Q|SPQR)")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")


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


class Difference(NamedTuple):
    """An entry in which a stated leaderboard is not what the records give here.

    Attributes:
        line: the entry and both values.
        tolerated: whether another machine's rounding explains it.
    """

    line: str
    tolerated: bool = False


def differences(stated: Any, found: Any) -> list[Difference]:
    """Every entry in which a stated leaderboard differs from the one that the records give.

    Figures that follow from features need an eigendecomposition, whose last bits depend on the machine's kernels (a
    relative 6e-10 was measured for the Frechet distance). So they may differ by one in the sixth digit, the last that a
    leaderboard has. All other entries are equal. A leaderboard that is older than the figures in LATER has none of
    them in any row, and is compared without them.
    """
    return list(_differences(stated, _as_old(found) if lacks_later_figures(stated) else found, ""))


def lacks_later_figures(board: dict[str, Any]) -> bool:
    """Whether no row of a leaderboard has any of the figures in LATER: it was computed before they existed."""
    return not any(key in row for row in board.get("rows", ()) for key in LATER)


def _as_old(board: dict[str, Any]) -> dict[str, Any]:
    return board | {"rows": [{k: v for k, v in row.items() if k not in LATER} for row in board["rows"]]}


def _differences(stated: Any, found: Any, place: str) -> Iterator[Difference]:
    if isinstance(stated, dict) and isinstance(found, dict):
        for key in sorted(stated.keys() | found.keys()):
            where = f"{place}.{key}" if place else key
            if key not in stated or key not in found:
                known = "missing" if key in found else "not what the records have"
                yield Difference(f"{shown(where)} is {known}")
            else:
                yield from _differences(stated[key], found[key], where)
    elif isinstance(stated, list) and isinstance(found, list) and len(stated) == len(found):
        for i, (one, other) in enumerate(zip(stated, found, strict=True)):
            yield from _differences(one, other, f"{place}[{i}]")
    elif type(stated) is not type(found) or stated != found:
        line = f"{shown(place)} is {shown(repr(stated))}, the records give {shown(repr(found))}"
        yield Difference(line, _is_rounding(stated, found, place))


def _is_rounding(stated: Any, found: Any, place: str) -> bool:
    """Whether two values are figures from features, or notes about them, that differ in the last digit alone."""
    if isinstance(stated, float) and isinstance(found, float) and FROM_FEATURES.search(place):
        return _close(stated, found)
    if isinstance(stated, str) and isinstance(found, str) and "FID" in stated and place.startswith("notes"):
        numbers = NUMBER.findall(stated), NUMBER.findall(found)
        same_words = NUMBER.sub("", stated) == NUMBER.sub("", found) and len(numbers[0]) == len(numbers[1])
        return same_words and all(_close(float(a), float(b)) for a, b in zip(*numbers, strict=True))
    return False


def _close(stated: float, found: float) -> bool:
    """Whether a figure of six digits is another one, or differs from it by one in the sixth digit."""
    return float(f"{stated:.6g}") == stated and abs(stated - found) <= 1.01e-5 * abs(found)
