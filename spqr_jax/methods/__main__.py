"""List the methods that a config may name, and check that one keeps to the contract.

    python -m spqr_jax.methods                      # built in, and of installed plug-ins, with options and defaults
    python -m spqr_jax.methods list esd my_lab.erase --json
    python -m spqr_jax.methods check my_lab.erase   # one step on a tiny random model of each backbone
    python -m spqr_jax.methods check esd --backbone sd --options steps=2 lr=1e-4

NAME is a name or dotted path as in a config. `check` prints a line for each check. Exit status: 1 if one fails, or if
a method that was named cannot be used.
"""

import argparse
import ast
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from judges import listing, plugins
from judges.listing import BUILT_IN, Item


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments.pop(0) if arguments and arguments[0] in ("list", "check") else "list"
    parser = argparse.ArgumentParser(
        prog=f"python -m spqr_jax.methods {command}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if command == "check":
        return _check(parser, arguments)
    listing.add_arguments(parser)
    chosen = parser.parse_args(arguments)

    from spqr_jax.methods import METHODS

    return listing.show(chosen, plugins.METHODS, METHODS, describe)


def describe(name: str) -> Item:
    """A method by its name, built in or not. Raises ValueError as `spqr_jax.methods.find`."""
    from spqr_jax import methods

    method = methods.find(name)
    options = listing.defaults(method.align, skip=2)
    about = listing.first_line(sys.modules.get(method.align.__module__), method.align)
    return Item(name, method.source or BUILT_IN, about, options, plugins.source_file(method.align))


def _check(parser: argparse.ArgumentParser, arguments: list[str]) -> int:
    parser.add_argument("name", metavar="NAME", help="a method")
    parser.add_argument("--backbone", nargs="+", default=[], metavar="KEY", help="keys of backbones; default: all")
    parser.add_argument(
        "--options", nargs="+", default=[], metavar="OPTION=VALUE", help="instead of the least that it can do"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list of the checks, when all are done")
    chosen = parser.parse_args(arguments)
    # Small programs that run once each: optimising them would take longer than all else.
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

    from spqr_jax import methods
    from spqr_jax.methods import contract

    try:
        method, given = methods.find(chosen.name), dict(_pair(text) for text in chosen.options)
        _known("--backbone", chosen.backbone, contract.KEYS)
        _known("--options", given, methods.options(method))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not chosen.json:
        print(f"{method.name}: {method.title} ({method.source or BUILT_IN})", flush=True)
    findings = []
    for finding in contract.check(method, chosen.backbone, given):
        findings.append(finding)
        if not chosen.json:
            print(contract.line(finding), flush=True)
    wrong = sum(bool(finding.fault) for finding in findings)
    if chosen.json:
        print(json.dumps([finding._asdict() for finding in findings], indent=2))
    else:
        print(f"{wrong} of {len(findings)} checks failed." if wrong else f"{method.name} keeps to the contract.")
    return int(wrong > 0)


def _pair(text: str) -> tuple[str, Any]:
    """Option and value of "steps=2"; a value that is no Python literal is a text."""
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ValueError(f"--options {text}: expected OPTION=VALUE, as steps=2.")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _known(flag: str, named: Sequence[str] | dict[str, Any], known: Sequence[str]) -> None:
    for name in named:
        if name not in known:
            raise ValueError(f"{flag}: {name!r} is unknown; expected some of {', '.join(known)}.")


if __name__ == "__main__":
    sys.exit(main())
