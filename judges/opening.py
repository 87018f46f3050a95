"""Opening a safety judge by its name in a config, and the protocol of safety judges.

A new kind of judge needs one file and one line: a class with an `open` classmethod in a file of its own, and its entry
in `JUDGES`. Keyword arguments of its `open` are options that a config may set. A judge that is an ONNX classifier needs
no code at all: see `judges.classifier`. One that is not of this package is a plug-in (`judges.plugged`).
"""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from judges import plugged, plugins
from judges.answers import SafetyRecord
from judges.classifier import Classifier
from judges.llavaguard import LlavaGuard
from judges.nudenet import open_label_set
from judges.nudenet_v2 import NudeNetV2
from judges.options import read_options
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


# Name before a colon -> opener(text after the colon, providers=..., options). An opener whose first parameter has a
# default may be named without more. A name may hold a colon itself; the longest name that fits is meant.
JUDGES: dict[str, Callable[..., Judge]] = {
    "nudenet": open_label_set,
    "nudenet:v2": NudeNetV2.open,
    "llavaguard": LlavaGuard.open,
    "q16": Q16.open,
    "classifier": Classifier.open,
}


def open_safety(source: str, *, providers: str | Sequence[str] | None = None) -> Judge:
    """Opens one safety judge.

    source: "nudenet" or "nudenet:LABEL_SET"; "nudenet:v2" for the whole-image classifier; "llavaguard:DIRECTORY" with
    LlavaGuard's policy in its policy.txt; "q16:DIRECTORY"; "classifier:PATH", or only the path of an ONNX classifier.
    The name of a plug-in or the dotted path of a class of your own, as "my_lab.Dark", with what its opener takes after
    a colon. Options of the judge may follow: "nudenet:v2?threshold=0.6", "llavaguard:DIR?view=base&mode=generate".
    providers: "cpu" (default) or "cuda", see `judges.session.open_session`. Raises JudgeError for an unknown kind or
    option and for a file that is missing or does not fit, ValueError for an unknown label set.
    """
    place, _ = split_options(source)
    if kind := kind_of(source):
        plugins.warn_if_refused(plugins.JUDGES, kind)
        return open_at(JUDGES[kind], source.removeprefix(kind).removeprefix(":"), name=source, providers=providers)
    if Path(place).is_file():
        return open_at(Classifier.open, source, name=source, providers=providers)
    kind = place.partition(":")[0]
    if plugin := plugged.find(kind, source):
        opener = plugged.opener(plugin, source)
        with plugged.clear_errors(plugin, source):
            opened = open_at(opener, source.removeprefix(kind).removeprefix(":"), name=source, providers=providers)
        return plugged.Plugged(opened, source, plugin.source(opener))
    raise JudgeError(f"judge {source!r}: no such judge and no such file; expected {_expected()}")


def open_at(
    opener: Callable[..., Any], source: str, *, name: str = "", providers: str | Sequence[str] | None = None
) -> Any:
    """opener(PLACE, providers=..., options) for a source "PLACE?option=value&...", of which both parts may be absent.

    name: the judge in messages, default the source. Raises JudgeError for a missing place, and for an option that the
    opener does not have or whose value it refuses; and whatever the opener raises.
    """
    place, given = split_options(source)
    where = f"judge {name or source!r}"
    first = _first_parameter(opener)
    if not place and first.default is inspect.Parameter.empty:
        kind = next((kind for kind, known in JUDGES.items() if known == opener), "")
        raise JudgeError(f"{where}: the {first.name} is missing; write {_form(kind) if kind else first.name.upper()}")
    options = read_options(opener, given, where)
    places = (place,) if place else ()
    try:
        return opener(*places, providers=providers, **options)
    except ValueError as error:
        if not options:
            raise
        raise JudgeError(f"{where}: {error}") from error


def split_options(source: str) -> tuple[str, str]:
    """A source's parts before and after its first "?". A file whose own name has a "?" is meant whole."""
    if Path(source).is_file():
        return source, ""
    place, _, options = source.partition("?")
    return place, options


def place_of(source: str) -> str:
    """The path that a safety judge's source names, or its name where the judge finds its own files: "nudenet:v2"."""
    place, _ = split_options(source)
    kind = kind_of(source)
    has_path = kind and _first_parameter(JUDGES[kind]).default is inspect.Parameter.empty
    return place.removeprefix(kind).removeprefix(":") if has_path else place


def options_of(opener: Callable[..., Any], source: str) -> dict[str, Any]:
    """The options that a source sets, each of its type: "broad9?threshold=0.5" of NudeNet -> label_set and threshold.

    source: without the kind that it begins with. Raises JudgeError as `open_at` does.
    """
    place, given = split_options(source)
    first = _first_parameter(opener)
    named = {first.name: place} if place and first.default is not inspect.Parameter.empty else {}
    return named | read_options(opener, given, f"judge {source!r}")


def kind_of(source: str) -> str:
    """The longest name in `JUDGES` that a source begins with; "" for a path and for a judge of another package."""
    place, _ = split_options(source)
    return max((name for name in JUDGES if place == name or place.startswith(f"{name}:")), key=len, default="")


def _expected() -> str:
    """Every form that a source may have, for messages."""
    own = [name for name in plugins.offered(plugins.JUDGES) if name not in JUDGES]
    return ", ".join([*map(_form, JUDGES), *own, "the dotted path of a class", "or the path of an ONNX classifier"])


def _form(kind: str) -> str:
    """How a source of this kind is written: "q16:DIRECTORY", "nudenet[:LABEL_SET]"."""
    first = _first_parameter(JUDGES[kind])
    place = f":{first.name.upper()}"
    return f"{kind}{place}" if first.default is inspect.Parameter.empty else f"{kind}[{place}]"


def _first_parameter(opener: Callable[..., Any]) -> inspect.Parameter:
    return next(iter(inspect.signature(opener).parameters.values()))
