"""The division of a verified submission: closed where a protocol was followed exactly, with pinned judges and prompts.

Pins say what an edition of the benchmark is made of, where its protocol names only kinds: the hashes of prompts, of the
judges' files and of the reference images. `pins.json` in this package has those that are known here. Who keeps a board
may pin more, from a bundle that is trusted (`pins_of`).
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from judges import recorded
from spqr_jax.submission import evidence
from spqr_jax.submission.bundle import Bundle
from spqr_jax.submission.places import shown

SHIPPED = Path(__file__).parent / "pins.json"
Pins = Mapping[str, Mapping[str, Any]]  # protocol -> "prompts", "judges", "reference" -> see `pins_of`


def shipped() -> Pins:
    """The pins of this package."""
    return read(SHIPPED)


def read(path: str | os.PathLike[str]) -> Pins:
    """The pins of a file. Raises OSError, or ValueError for a file of another form."""
    pins = json.loads(Path(path).read_text(encoding="utf-8"))
    parts = ("prompts", "judges", "reference")
    if not isinstance(pins, dict) or not all(isinstance(p, dict) and {*p} <= {*parts} for p in pins.values()):
        raise ValueError(f"{path}: expected an object, protocol -> {', '.join(parts)}.")
    return pins


def pins_of(bundle: Bundle) -> dict[str, Any]:
    """What the closed division would require if this bundle set it: one protocol with all of its pins.

    "prompts": role -> the accepted sha256 of its rows. "judges": kind -> the entries that a judge's identity must have.
    "reference": the accepted digests of the real images' features.
    """
    judges = sorted(bundle.manifest["judges"].items())
    return {
        bundle.manifest["protocol"]["name"]: {
            "prompts": {role: [bundle.prompts[role]["sha256"]] for role in sorted(bundle.prompts)},
            "judges": {str(j.get("judge")): recorded.without_provider(j) for _, j in judges},
            "reference": [] if bundle.reference is None else [_reference(bundle)],
        }
    }


def _reference(bundle: Bundle) -> str:
    return evidence.digest_of_arrays(bundle.reference or {})


def reasons(bundle: Bundle, pins: Pins) -> list[str]:
    """What keeps a verified submission out of the closed division, a line each; empty for a closed one."""
    return list(_reasons(bundle, pins))


def _reasons(bundle: Bundle, pins: Pins) -> Iterator[str]:
    name = bundle.manifest["protocol"]["name"]
    changed = bundle.manifest["protocol"]["changed"] | bundle.leaderboard["protocol"]["changed"]
    for field, (found, expected) in sorted(changed.items()):
        yield f"{shown(field)} is {shown(repr(found))}, {name} has {shown(repr(expected))}"
    pinned = pins.get(name, {})
    for role, stated in sorted(bundle.prompts.items()):
        yield from _hash_reason(f"the {role} prompts", stated["sha256"], pinned.get("prompts", {}).get(role))
    if bundle.reference is None:
        yield "there are no reference images, so no Q"
    else:
        yield from _hash_reason("the reference images", _reference(bundle), pinned.get("reference"))
    for judge, identity in sorted(bundle.manifest["judges"].items()):
        yield from _judge_reason(judge, identity, pinned.get("judges", {}).get(str(identity.get("judge"))))


def _hash_reason(what: str, found: str, accepted: list[str] | None) -> Iterator[str]:
    if not accepted:
        yield f"{what} are not pinned for this protocol"
    elif found not in accepted:
        yield f"{what} have sha256 {found[:12]}, pinned are {', '.join(sha[:12] for sha in accepted)}"


def _judge_reason(judge: str, identity: Mapping[str, Any], pinned: Mapping[str, Any] | None) -> Iterator[str]:
    if "judge" in identity and judge not in ("clip_score", "features") and not recorded.knows(identity):
        yield f"judge {shown(judge)} has a rule that is not known here, so its verdicts were believed"
    if not pinned:
        yield f"judge {shown(judge)} is not pinned for this protocol"
        return
    place = _difference(pinned, recorded.without_provider(identity))
    if place:
        yield f"judge {shown(judge)} is not the pinned one ({place})"


def _difference(pinned: Any, found: Any, place: str = "") -> str:
    """The first entry that is pinned and that an identity does not have; "" if it has all."""
    if isinstance(pinned, Mapping) and isinstance(found, Mapping):
        parts = (_difference(pinned[key], found.get(key), f"{place}.{key}" if place else key) for key in sorted(pinned))
        return next(filter(None, parts), "")
    return "" if pinned == found else f"{place}: {shown(repr(found))}, pinned {shown(repr(pinned))}"
