"""`python -m spqr_jax.report WORKDIR`: write WORKDIR/report again, from what is on disk."""

import argparse
import sys

from spqr_jax.report.html import write


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m spqr_jax.report", description="Report on a finished work directory."
    )
    parser.add_argument("workdir", help="directory with leaderboard.json, manifest.json and cells/")
    parser.add_argument("--tables", nargs="*", metavar="N", help="tables to write (1, 2, 3); default all")
    parser.add_argument("--prompts", type=int, default=48, help="prompts in the gallery (default %(default)s)")
    options = parser.parse_args(arguments)
    try:
        path = write(options.workdir, tables=options.tables, prompts=options.prompts)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
