"""Look at a data set before training on it, and list the kinds that a config may name.

    python -m spqr_jax.data check pictures/coco
    python -m spqr_jax.data check images/styles --kind artistic --judges nudenet=nudenet --samples 5000
    python -m spqr_jax.data list [KIND...] [--json]      # built in, and of installed plug-ins, with their options

PATH is written as in bft.data: KIND:PATH?OPTION=VALUE, or several of these joined by " + ". Exit status: 0 if nothing
is wrong, 1 if something is, 2 if the data set cannot be opened.
"""

import argparse
import sys
from collections.abc import Sequence

from judges import listing, plugins
from judges.listing import BUILT_IN, Item
from spqr_jax.data import opening


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m spqr_jax.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command")
    listing.add_arguments(commands.add_parser("list", help="list the kinds of data"))
    _add_check(commands.add_parser("check", help="look at a data set"))
    chosen = parser.parse_args(["list"] if not (sys.argv[1:] if argv is None else argv) else argv)
    if chosen.command == "list":
        return listing.show(chosen, plugins.DATA, opening.KINDS, describe)
    return _check(chosen)


def describe(name: str) -> Item:
    """A kind of data by its name, built in or not. Raises ValueError as `spqr_jax.data.opening.find`."""
    reader = opening.find(name, f"data {name!r}")
    about = listing.first_line(reader.open)
    options, file = listing.defaults(reader.open, skip=1), plugins.source_file(reader.open)
    return Item(name, reader.plugin or BUILT_IN, about, options, file)


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="a data set")
    parser.add_argument("--kind", help="its layout; default: found from its files")
    parser.add_argument("--samples", type=int, default=0, help="look only at the first samples of a run; default: all")
    parser.add_argument("--seed", type=int, default=0, help="seed of that run")
    parser.add_argument("--side", type=int, default=512, help="pixels at which judges see the images")
    parser.add_argument(
        "--judges", nargs="*", default=[], metavar="NAME=WHERE", help="written as in the config: nudenet=nudenet"
    )
    parser.add_argument("--providers", default="cpu", help="device of the judges: cpu or cuda")


def _check(chosen: argparse.Namespace) -> int:
    from spqr_jax import data
    from spqr_jax.data import check
    from spqr_jax.run import jury

    try:
        source = data.open_source(f"{chosen.kind}:{chosen.path}" if chosen.kind else chosen.path)
        named = dict(_pair(judge) for judge in chosen.judges)
        judges = {name: jury.open_safety(where, chosen.providers) for name, where in named.items()}
        report = check.check(source, judges, samples=chosen.samples, seed=chosen.seed, side=chosen.side)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"spqr_jax.data: {error}", file=sys.stderr)
        return 2
    print(check.text(report))
    return int(report.wrong)


def _pair(judge: str) -> tuple[str, str]:
    name, equals, where = judge.partition("=")
    if not (name and equals and where):
        raise ValueError(f"--judges {judge}: expected NAME=WHERE, as nudenet=nudenet.")
    return name, where


if __name__ == "__main__":
    sys.exit(main())
