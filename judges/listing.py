"""What can be named in a config, listed: where it comes from, its options with their defaults, and what it is.

Used by `python -m judges`, `python -m spqr_jax.methods` and `python -m spqr_jax.data`.
"""

import argparse
import inspect
import json
import sys
import textwrap
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from judges import plugins

BUILT_IN = "built in"


class Item(NamedTuple):
    """A thing that can be named in a config.

    Attributes:
        name: as a config has it.
        origin: "built in", or the distribution, version, place and sha256 of a plug-in (`Plugin.source`).
        about: what it is, in one line.
        options: option -> its default as Python writes it; "" where it has none or its opener does not say.
        file: the path of the file that defines it.
        fault: why it cannot be used; "" if it can.
    """

    name: str
    origin: str
    about: str = ""
    options: Mapping[str, str] = types.MappingProxyType({})
    file: str = ""
    fault: str = ""


def defaults(function: Callable[..., Any], *, skip: int) -> dict[str, str]:
    """parameter -> its default as Python writes it, "" without one, for all named parameters but the first `skip`."""
    named = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD][skip:]
    return {p.name: "" if p.default is p.empty else repr(p.default) for p in named}


def first_line(*documented: Any) -> str:
    """The first line of the first docstring that there is, of functions, classes or modules."""
    texts = (inspect.getdoc(thing) for thing in documented if thing is not None)
    return next((text.splitlines()[0] for text in texts if text), "")


def every(group: str, builtin: Collection[str], describe: Callable[[str], Item]) -> list[Item]:
    """The built-in things, then those that distributions offer in a group. Each is imported to be described."""
    items = [describe(name) for name in builtin]
    for name, points in plugins.offered(group).items():
        if name in builtin:
            items += [Item(name, "", fault=plugins.refusal(group, name))]
        else:
            origin = " and ".join(f"{plugins.distribution(point)} {point.value}" for point in points)
            items += [_described(name, origin, describe)]
    return items


def _described(name: str, origin: str, describe: Callable[[str], Item]) -> Item:
    try:
        return describe(name)
    except Exception as error:  # a plug-in may raise anything
        return Item(name, origin, fault=" ".join(str(error).split()) or type(error).__name__)


def text(items: Sequence[Item]) -> str:
    """The items to print: a line for the name and origin, and lines for the rest below it."""
    return "\n".join(line for item in items for line in _lines(item))


def _lines(item: Item) -> list[str]:
    options = ", ".join(f"{name}={value}" if value else name for name, value in item.options.items())
    rest = [item.about, item.origin != BUILT_IN and item.file, options and f"options: {options}"]
    rest += [item.fault and f"cannot be used: {item.fault}"]
    wrapped = [textwrap.fill(part, 116, initial_indent="    ", subsequent_indent="        ") for part in rest if part]
    return [f"{item.name}  ({item.origin})" if item.origin else item.name, *wrapped]


def as_json(items: Sequence[Item]) -> str:
    """The items as a JSON list of objects with the fields of `Item`."""
    return json.dumps(
        [item._asdict() | {"options": dict(item.options)} for item in items], indent=2, ensure_ascii=False
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of a command that lists: names and --json."""
    parser.add_argument("names", nargs="*", metavar="NAME", help="list these alone; a dotted path of your own too")
    parser.add_argument("--json", action="store_true", help="print a JSON list")


def show(chosen: argparse.Namespace, group: str, builtin: Collection[str], describe: Callable[[str], Item]) -> int:
    """Print what was asked for. Returns the exit status: 1 if a thing that was named cannot be used."""
    named = [_described(name, "", describe) for name in chosen.names]
    items = named or every(group, builtin, describe)
    print(as_json(items) if chosen.json else text(items))
    for name in chosen.names:
        if name in builtin and (refused := plugins.refusal(group, name)):
            print(refused, file=sys.stderr)
    return int(any(item.fault for item in named))
