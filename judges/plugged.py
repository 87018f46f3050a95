"""Safety judges that are not of this package: plug-ins, and classes of your own by their dotted path.

Such a judge is a function `open(PLACE, *, providers, ...)`, or a class (or module) with one. It returns a
`judges.opening.Judge`. Its answers are checked, since a wrong one would be counted like any other.
"""

import contextlib
import inspect
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from judges import plugins
from judges.answers import VERDICTS, SafetyRecord
from judges.plugins import Plugin, PluginError
from judges.session import JudgeError

FORM = "open(PLACE, *, providers, ...)"
GRAPHS = (".onnx", ".json")  # the end of a missing file's name, which is no dotted path


def find(kind: str, source: str) -> Plugin | None:
    """The plug-in that the first part of a judge's source names, or the dotted path there; None for any other text.

    Raises JudgeError if it cannot be imported, or if several distributions offer it.
    """
    where = f"judge {source!r}"
    try:
        if plugin := plugins.find(plugins.JUDGES, kind, where):
            return plugin
        return plugins.imported(kind, where) if plugins.is_dotted(kind) and not kind.endswith(GRAPHS) else None
    except PluginError as error:
        raise JudgeError(str(error)) from error


def opener(plugin: Plugin, source: str) -> Callable[..., Any]:
    """The function that opens a plug-in's judge. Raises JudgeError if it has not the form `FORM`."""
    found = plugin.value
    if inspect.ismodule(found) or inspect.isclass(found):
        found = getattr(found, "open", None)
    if not callable(found):
        raise JudgeError(f"judge {source!r}: {plugin.place} has no {FORM}; write it there")
    parameters = list(inspect.signature(found).parameters.values())
    if not parameters or parameters[0].kind is inspect.Parameter.KEYWORD_ONLY:
        raise JudgeError(f"judge {source!r}: {plugin.place} takes no PLACE; expected the form {FORM}")
    if not any(p.name == "providers" or p.kind is p.VAR_KEYWORD for p in parameters):
        raise JudgeError(f"judge {source!r}: {plugin.place} does not take `providers`; expected the form {FORM}")
    return found


@contextlib.contextmanager
def clear_errors(plugin: Plugin, source: str) -> Iterator[None]:
    """Make every error but JudgeError a JudgeError that names the judge and its distribution."""
    try:
        yield
    except JudgeError:
        raise
    except Exception as error:
        of = f" of {plugin.distribution}" if plugin.distribution else ""
        raise JudgeError(f"judge {source!r}: {plugin.place}{of} does not open ({plugins.in_words(error)})") from error


class Plugged:
    """A judge of a plug-in. Its identity has "plugin", its source (`Plugin.source`), beside what the judge tells.

    Raises JudgeError unless `judge` has the form of `judges.opening.Judge`.
    """

    def __init__(self, judge: Any, name: str, source: str):
        told = getattr(judge, "identity", None)
        if not callable(judge) or not isinstance(told, dict):
            found = type(judge).__name__
            raise JudgeError(f"judge {name!r} opened as {found}; expected a callable with a dictionary `identity`")
        try:
            json.dumps(told, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise JudgeError(f"judge {name!r}: its identity is no JSON ({error}); use texts and numbers") from None
        self.judge, self.name = judge, name
        self.identity = told | {"plugin": source}

    def __call__(self, images: np.ndarray, /) -> list[SafetyRecord]:
        """uint8 [N, H, W, 3] -> N records. Raises JudgeError for answers of another number or form."""
        records = list(self.judge(images))
        if len(records) != len(images):
            raise JudgeError(f"judge {self.name!r} answered {len(records)} times about {len(images)} images")
        for record in records:
            verdict = getattr(record, "verdict", None)
            if verdict not in VERDICTS:
                raise JudgeError(f"judge {self.name!r} said {verdict!r}; expected one of {', '.join(VERDICTS)}")
        return records
