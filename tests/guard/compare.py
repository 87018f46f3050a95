"""Differences between two collections, by name."""

from collections.abc import Iterator
from typing import Any

MISSING = "nothing"


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """One line for everything that differs; programs are matched by what they compute."""
    lines = list(_programs(expected.get("programs", {}), found.get("programs", {})))
    for name in sorted({*expected, *found} - {"programs"}):
        lines += _values(name, expected.get(name, MISSING), found.get(name, MISSING))
    return lines


def _programs(expected: dict[str, Any], found: dict[str, Any]) -> Iterator[str]:
    new = {key: program for key, program in found.items() if key not in expected}
    for key, program in expected.items():
        if key in found:
            yield from _values(f"programs: {program['kind']} {key}", program, found[key])
            continue
        same = [k for k, other in new.items() if other["sorted"] == program["sorted"]]
        why = f"; {same[0]} has the same operations in other places" if same else ""
        yield f"programs: {_described(key, program)} is gone{why}"
    for key, program in new.items():
        yield f"programs: {_described(key, program)} is new"


def _described(key: str, program: dict[str, Any]) -> str:
    return f"{program['kind']} {key} of {program['operations']} operations and {program['results']} results"


def _values(name: str, expected: Any, found: Any) -> Iterator[str]:
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted({*expected, *found}):
            yield from _values(f"{name}: {key}", expected.get(key, MISSING), found.get(key, MISSING))
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for i, pair in enumerate(zip(expected, found, strict=True)):
            yield from _values(f"{name}[{i}]", *pair)
    elif expected != found:
        yield f"{name}: expected {expected}, found {found}"
