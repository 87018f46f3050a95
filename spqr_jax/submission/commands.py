"""The commands of submissions, behind `python -m spqr_jax.report`: submit, verify, pins, export."""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from spqr_jax.submission import bundle, division, pack, rerun
from spqr_jax.submission import export as export_lib
from spqr_jax.submission import verify as verify_lib


class Outcome(NamedTuple):
    """What a command prints, and its exit status."""

    text: str
    status: int = 0


def submit(arguments: list[str]) -> Outcome:
    """Write a bundle. Raises as `pack.of_run` and `bundle.write`."""
    parser = _parser("submit", "Pack a finished run as a bundle that anyone can verify, without its images.")
    parser.add_argument("run", metavar="RUN", help="work directory of a finished run")
    parser.add_argument("--out", required=True, help="directory to write; an existing other one is never replaced")
    parser.add_argument(
        "--clear",
        action="append",
        default=[],
        metavar="SET",
        help="a prompt set whose licence allows that its texts are published; others are in the bundle as hashes",
    )
    options = parser.parse_args(arguments)
    path = bundle.write(pack.of_run(options.run, options.clear), options.out)
    index = bundle.read_index(path)
    return Outcome(f"{path}: {len(index['files'])} files, {index['bytes']:,} bytes, submission {index['id']}")


def verify(arguments: list[str]) -> Outcome:
    """Verify a bundle: exit status 0 or 1. Raises OSError and ValueError for a wrong argument."""
    parser = _parser("verify", "Check a bundle: form, hashes, and every score again from its records. Exit 0 or 1.")
    parser.add_argument("bundle", metavar="DIR", help="a bundle that `submit` wrote")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--id", default="", help="the id that the submission was published under, or its beginning")
    parser.add_argument("--pins", help="what the closed division requires, as JSON; default: what this package knows")
    again = parser.add_argument_group("images made again", "needs the weights, data, prompts and judges of the run")
    again.add_argument("--rerun", type=float, metavar="SHARE", help="of the prompts: make their images again")
    again.add_argument("--seed", type=int, default=0, help="of the draw of prompts (default %(default)s)")
    again.add_argument("--subjects", type=lambda text: text.split(","), help="only these, comma-separated")
    again.add_argument("--workdir", help="where to work; default: a temporary directory")
    again.add_argument("--set", action="append", default=[], metavar="FIELD=PATH", help="a path on this machine")
    again.add_argument("--allow", action="append", default=[], metavar="METHOD", help="import this method's package")
    options = parser.parse_args(arguments)
    pins = division.read(options.pins) if options.pins else None
    found = verify_lib.check(options.bundle, id=options.id, pins=pins)
    again_found = _made_again(options) if found.verified and options.rerun is not None else None
    if again_found and again_found.faults:
        found = found._replace(faults=again_found.faults)
    text = verify_lib.as_json(found) if options.json else verify_lib.text(found)
    if again_found and not again_found.faults and not options.json:
        text += "\n" + rerun.text(again_found)
    return Outcome(text, int(not found.verified))


def _made_again(options: argparse.Namespace) -> rerun.Rerun:
    pairs = [item.partition("=") for item in options.set]
    changes = {field: value for field, _, value in pairs}
    asked = rerun.Asked(options.rerun, options.seed, options.subjects, changes, options.allow)
    with tempfile.TemporaryDirectory() as folder:
        return rerun.check(bundle.read(options.bundle), Path(options.workdir or folder), asked)


def pins(arguments: list[str]) -> Outcome:
    """Print the pins of a bundle. Raises Refused."""
    parser = _parser("pins", "Print what the closed division requires if this bundle sets it, for verify --pins.")
    parser.add_argument("bundle", metavar="DIR", help="a bundle that you trust")
    return Outcome(json.dumps(division.pins_of(bundle.read(parser.parse_args(arguments).bundle)), indent=2))


def export(arguments: list[str]) -> Outcome:
    """Write a verified bundle in another format. Raises ValueError for one that is not verified."""
    parser = _parser("export", "Write the figures of a verified bundle in a format that others collect results in.")
    parser.add_argument("bundle", metavar="DIR", help="a bundle that `submit` wrote")
    parser.add_argument("--format", required=True, choices=list(export_lib.FORMATS))
    parser.add_argument("--out", required=True, help="directory to write, a file a subject")
    parser.add_argument("--organisation", default="unknown", help="who evaluated (every_eval_ever)")
    parser.add_argument(
        "--relationship",
        default="other",
        choices=export_lib.RELATIONSHIPS,
        help="of who evaluated to the models (every_eval_ever; default %(default)s)",
    )
    options = parser.parse_args(arguments)
    source = export_lib.Source(
        bundle.read(options.bundle),
        verify_lib.check(options.bundle),
        options.organisation,
        options.relationship,
        int(time.time()),
    )
    paths = export_lib.write(source, options.format, Path(options.out))
    return Outcome("\n".join(map(str, paths)))


COMMANDS: dict[str, Callable[[list[str]], Outcome]] = {
    "submit": submit,
    "verify": verify,
    "pins": pins,
    "export": export,
}


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"python -m spqr_jax.report {command}", description=description)
