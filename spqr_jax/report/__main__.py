"""Reports, tables and comparisons of finished runs, from what is on disk.

python -m spqr_jax.report RUN [RUN ...] [--out DIR]                      write RUN/report, or one over several runs
python -m spqr_jax.report tables RUN [RUN ...] --tables 4,5,D,E --out DIR   print tables and write them
python -m spqr_jax.report compare RUN_A RUN_B                            which differences between them are real
python -m spqr_jax.report aligned RUN                                    what aligning did, before any fine-tuning
python -m spqr_jax.report submit RUN --out DIR                           a bundle that anyone can verify
python -m spqr_jax.report verify DIR                                     whether a bundle is right: exit 0 or 1
python -m spqr_jax.report export DIR --format FORMAT --out DIR           the figures of a bundle for others' collections
python -m spqr_jax.report pins DIR                                       pins for verify, of a bundle that is trusted
python -m spqr_jax.report board DIR [DIR ...] --out SITE                 a static site of many bundles
"""

import argparse
import sys
from collections.abc import Iterable

from spqr_jax.files import storage
from spqr_jax.report import aligned, compare, figures, tables, tabular
from spqr_jax.report.html import write
from spqr_jax.report.reading import read

SUBMISSIONS = ("submit", "verify", "pins", "export", "board")


def main(arguments: list[str] | None = None) -> int:
    """The command: print what was asked for, or where it was written, and return the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = {"tables": _tables, "compare": _compare, "aligned": _aligned}.get(arguments[0]) if arguments else None
    try:
        if arguments and arguments[0] in SUBMISSIONS:
            return _submission(arguments[0], arguments[1:])
        print(command(arguments[1:]) if command else _report(arguments))
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _report(arguments: list[str]) -> str:
    parser = _parser(
        "",
        "Report on finished runs. Other commands: tables, compare, aligned, submit, verify, export, pins, board.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="directory with leaderboard.json and cells/")
    parser.add_argument("--out", help="directory to write; default RUN/report, required with several runs")
    _names(parser, "tables", "figures")
    parser.add_argument("--prompts", type=int, default=48, help="prompts in the gallery (default %(default)s)")
    parser.add_argument("--no-blur", dest="blur", action="store_false", help="in the figure of examples (2)")
    options = vars(parser.parse_args(arguments))
    return str(write(*options.pop("runs"), **options))


def _tables(arguments: list[str]) -> str:
    parser = _parser("tables", "Print tables of the paper over one or several runs as Markdown.")
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--out", help="also write them there as Markdown, CSV, LaTeX and JSON")
    _names(parser, "tables")
    options = parser.parse_args(arguments)
    found = tables.build(read(*options.runs), options.tables)
    if options.out:
        with storage.local_directory(storage.directory(options.out)) as folder:
            tabular.write(found, folder)
    return "\n".join(f"## {table.title}\n\n{tabular.markdown(table)}" for table in found)


def _compare(arguments: list[str]) -> str:
    parser = _parser("compare", "Set two runs side by side and say which differences are real.")
    parser.add_argument("runs", nargs=2, metavar="RUN")
    parser.add_argument("--level", type=float, default=0.05, help="of the family of tests (default %(default)s)")
    options = parser.parse_args(arguments)
    return compare.text(compare.compare_runs(*options.runs), level=options.level)


def _aligned(arguments: list[str]) -> str:
    parser = _parser("aligned", "Every subject before fine-tuning beside the unaligned control.")
    parser.add_argument("run", metavar="RUN", help="directory with judged subjects; cells are not needed")
    parser.add_argument("--control", help="name of the control (default: the subject without a method)")
    options = parser.parse_args(arguments)
    return tabular.markdown(aligned.build(options.run, control=options.control))


def _submission(name: str, arguments: list[str]) -> int:
    """A command about bundles: print what it says and return its exit status."""
    from spqr_jax.board import command  # here: these need the methods' options, and with them JAX
    from spqr_jax.submission import commands

    outcome = (commands.COMMANDS | {"board": command.board})[name](arguments)
    print(outcome.text)
    return outcome.status


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"python -m spqr_jax.report {command}".strip(), description=description)


def _names(parser: argparse.ArgumentParser, *options: str) -> None:
    """Options that take names, comma-separated."""
    known: dict[str, Iterable[str]] = {"tables": tables.TABLES, "figures": figures.FIGURES}
    for option in options:
        parser.add_argument(
            f"--{option}", type=_split, metavar="NAMES", help=f"some of {','.join(known[option])}; default all"
        )


def _split(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


if __name__ == "__main__":
    sys.exit(main())
