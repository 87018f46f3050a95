"""Opening a safety judge by its name in a config, and the protocol of safety judges.

A new kind of judge needs one file and one line: a class with an `open` classmethod in a file of its own, and its entry
in `JUDGES`. A judge that is an ONNX classifier needs no code at all: see `judges.classifier`.
"""

import inspect
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from judges.answers import SafetyRecord
from judges.classifier import Classifier
from judges.llavaguard import LlavaGuard
from judges.nudenet import open_label_set
from judges.q16 import Q16
from judges.session import JudgeError


@runtime_checkable
class Judge(Protocol):
    """An opened safety judge.

    Attributes:
        identity: which variant it is (judge, model, sha256 of its files, options); JSON-safe, stored with the results.
    """

    identity: dict[str, Any]

    def __call__(self, images: np.ndarray, /) -> Sequence[SafetyRecord]:
        """uint8 [N, H, W, 3] RGB -> N records. An image that cannot be judged is "undecided" with the reason.

        Raises ValueError for an array that is no batch of RGB images.
        """
        ...


# Name before the colon -> opener(text after the colon, providers=...). An opener whose first parameter has a default
# may be named without a colon.
JUDGES: dict[str, Callable[..., Judge]] = {
    "nudenet": open_label_set,
    "llavaguard": LlavaGuard.open,
    "q16": Q16.open,
    "classifier": Classifier.open,
}


def open_safety(source: str, *, providers: str | Sequence[str] | None = None) -> Judge:
    """Opens one safety judge.

    source: "nudenet" or "nudenet:LABEL_SET"; "llavaguard:DIRECTORY" with LlavaGuard's policy in its policy.txt;
    "q16:DIRECTORY"; "classifier:PATH", or only the path of an ONNX classifier. providers: "cpu" (default) or "cuda",
    see `judges.session.open_session`. Raises JudgeError for an unknown kind and for a file that is missing or does not
    fit, ValueError for an unknown label set.
    """
    named = re.fullmatch(r"([a-z][a-z0-9_]+)(?::(.*))?", source)  # two letters or more: "c:judge.onnx" is a path
    kind, place = (named[1], named[2]) if named else ("", "")
    if kind not in JUDGES:
        if Path(source).is_file():
            return Classifier.open(source, providers=providers)
        raise JudgeError(f"judge {source!r}: no such judge and no such file; expected {_expected()}")
    if place:
        return JUDGES[kind](place, providers=providers)
    first = _first_parameter(JUDGES[kind])
    if first.default is inspect.Parameter.empty:
        raise JudgeError(f"judge {source!r}: the {first.name} is missing; write {_form(kind)}")
    return JUDGES[kind](providers=providers)


def _expected() -> str:
    """Every form that a source may have, for messages."""
    return ", ".join([*map(_form, JUDGES), "or the path of an ONNX classifier"])


def _form(kind: str) -> str:
    """How a source of this kind is written: "q16:DIRECTORY", "nudenet[:LABEL_SET]"."""
    first = _first_parameter(JUDGES[kind])
    place = f":{first.name.upper()}"
    return f"{kind}{place}" if first.default is inspect.Parameter.empty else f"{kind}[{place}]"


def _first_parameter(opener: Callable[..., Judge]) -> inspect.Parameter:
    return next(iter(inspect.signature(opener).parameters.values()))
