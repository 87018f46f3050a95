"""`python -m spqr_jax.report board DIR... --out SITE`: verify bundles and write the site."""

import argparse
import sys
from pathlib import Path

from spqr_jax.board import site
from spqr_jax.submission import division
from spqr_jax.submission.commands import Outcome

CACHE = ".cache/board"


def board(arguments: list[str]) -> Outcome:
    """Write the site. The exit status is 1 with --strict where a bundle is not verified.

    Raises OSError and ValueError for a wrong argument.
    """
    options = _parser().parse_args(arguments)
    made = site.write(
        options.bundles,
        options.out,
        cache=options.cache or None,
        pins=division.read(options.pins) if options.pins else None,
        papers=options.papers,
        title=options.title,
        progress=_tell,
    )
    print(file=sys.stderr)
    return Outcome(site.summary(made, Path(options.out)), int(options.strict and bool(made.refused)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m spqr_jax.report board",
        description="Verify submissions and write a static site of them.",
    )
    parser.add_argument("bundles", nargs="+", metavar="DIR", help="a bundle, or a folder of bundles")
    parser.add_argument("--out", required=True, metavar="SITE", help="directory to write, with index.html")
    parser.add_argument(
        "--cache",
        default=CACHE,
        metavar="DIR",
        help='what was found out about bundles, by a hash of their bytes (default %(default)s; "" keeps nothing)',
    )
    parser.add_argument("--pins", metavar="FILE", help="what the closed division requires, as for `verify`")
    parser.add_argument("--papers", action="store_true", help="also show the papers' figures, apart, as not verifiable")
    parser.add_argument("--title", default=site.TITLE, help="of the site (default %(default)s)")
    parser.add_argument("--strict", action="store_true", help="exit 1 where a bundle is not verified")
    return parser


def _tell(text: str) -> None:
    print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
