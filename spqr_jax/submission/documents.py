"""The JSON documents of a bundle: one canonical form, read strictly, and checked by the schemas in this package."""

import functools
import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jsonschema

from spqr_jax.submission.places import Refused, shown

SCHEMAS = Path(__file__).parent / "schemas"
MOST_FAULTS = 20  # of one document that are named


def dumps(value: Any) -> bytes:
    """The canonical form: UTF-8, sorted keys, an indent of one, numbers as Python writes them, a newline at the end.

    Raises ValueError for NaN, infinities and text that is not Unicode.
    """
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def loads(data: bytes, name: str) -> Any:
    """The value of a document in canonical form.

    Raises Refused, naming the file, for anything else: another encoding, a key that occurs twice, NaN, infinities,
    nesting without end, other white space, another order of keys.
    """
    try:
        value = json.loads(
            data.decode(), object_pairs_hook=_object, parse_constant=_no_constant, parse_float=_finite_float
        )
        canonical = dumps(value)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else shown(str(error))
        raise Refused([f"{name}: no JSON that is accepted ({reason})"]) from None
    if canonical != data:
        raise Refused([f"{name}: not in the canonical form that `submit` writes"])
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} occurs twice")
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text} is infinite")
    return value


def sha256(value: Any) -> str:
    """Hexadecimal sha256 of a value's canonical form."""
    return hashlib.sha256(dumps(value)).hexdigest()


def sha256_of_text(text: str) -> str:
    """Hexadecimal sha256 of a text as UTF-8: what stands for the text of a prompt."""
    return hashlib.sha256(text.encode()).hexdigest()


@functools.lru_cache(maxsize=16)
def validator(kind: str) -> jsonschema.Draft202012Validator:
    """The validator of a kind of document: "submission", "manifest", "prompts", "leaderboard" or "cell"."""
    schema = json.loads((SCHEMAS / f"{kind}.json").read_text(encoding="utf-8"))
    return jsonschema.Draft202012Validator(schema)


def faults(kind: str, value: Any, name: str) -> list[str]:
    """What a document has that its schema does not allow, each with its place; at most MOST_FAULTS of them."""
    errors: Iterable[jsonschema.ValidationError] = validator(kind).iter_errors(value)
    found = []
    for error, _ in zip(errors, range(MOST_FAULTS), strict=False):
        place = ".".join(map(str, error.absolute_path))
        found.append(f"{name}: {shown(place) or 'document'}: {shown(error.message)}")
    return found
