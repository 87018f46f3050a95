"""Options of a judge as text, "threshold=0.6&view=base", and the keyword arguments that they become.

What a judge's opener takes is read from its signature, so a new keyword argument is an option without more code.
"""

import inspect
import types
from collections.abc import Callable
from typing import Any, Union, Unpack, get_args, get_origin, get_type_hints

from judges.session import JudgeError

NOT_OPTIONS = ("providers",)  # the same for all judges of a run, and given by its config
BOOLEANS = {"true": True, "false": False}


def read_options(opener: Callable[..., Any], text: str, where: str) -> dict[str, Any]:
    """`text` ("name=value&name=value", or "") as keyword arguments of `opener`, each of its parameter's type.

    where: the judge, for messages. Raises JudgeError for an option that the opener does not have (with those that it
    has), for one given twice, and for a value of another type.
    """
    known = option_types(opener)
    options: dict[str, Any] = {}
    for pair in filter(None, text.split("&")):
        name, equals, value = pair.partition("=")
        if name not in known:
            raise JudgeError(f"{where}: no option {name!r}; its options are {', '.join(sorted(known)) or 'none'}")
        if not equals or name in options:
            raise JudgeError(f"{where}: write {name}=VALUE once, found {text!r}")
        options[name] = convert(value, known[name], f"{where}: {name}")
    return options


def option_types(opener: Callable[..., Any]) -> dict[str, tuple[type, ...]]:
    """Option -> the types that it may have, from the opener's keyword-only parameters and its `**options`."""
    hints = get_type_hints(opener)
    found: dict[str, Any] = {}
    for name, parameter in inspect.signature(opener).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            found[name] = hints.get(name, str)
        elif parameter.kind is inspect.Parameter.VAR_KEYWORD and get_origin(hints.get(name)) is Unpack:
            found |= get_type_hints(get_args(hints[name])[0])
    return {name: members(hint) for name, hint in found.items() if name not in NOT_OPTIONS}


def members(hint: Any) -> tuple[type, ...]:
    """The types of a union, or the type alone; of a generic type like tuple[str, ...] only `tuple`."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return tuple(get_origin(kind) or kind for kind in kinds)


def convert(value: str, kinds: tuple[type, ...], where: str) -> Any:
    """The text `value` as the first of bool, int, float and tuple that is among `kinds`, else as it stands.

    A tuple is written with commas. Raises JudgeError if the text is no such value.
    """
    if bool in kinds:
        if value.lower() not in BOOLEANS:
            raise JudgeError(f"{where}: expected true or false, found {value!r}")
        return BOOLEANS[value.lower()]
    number = next((kind for kind in (int, float) if kind in kinds), None)
    if number:
        try:
            return number(value)
        except ValueError:
            kind = "a whole number" if number is int else "a number"
            raise JudgeError(f"{where}: expected {kind}, found {value!r}") from None
    return tuple(value.split(",")) if tuple in kinds else value
