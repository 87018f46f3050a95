"""Look at a data set before training on it.

    python -m spqr_jax.data check pictures/coco
    python -m spqr_jax.data check pictures/styles --kind artistic --judges nudenet=nudenet --samples 5000

PATH may be all that bft.data may be: KIND:PATH?OPTION=VALUE, or several joined by " + ". Exit status: 0, 1 if something
is wrong, 2 if the data set cannot be opened.
"""

import argparse
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    from spqr_jax import data
    from spqr_jax.data import check
    from spqr_jax.run import jury

    parser = argparse.ArgumentParser(
        prog="python -m spqr_jax.data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["check"])
    parser.add_argument("path", help="a data set")
    parser.add_argument("--kind", choices=list(data.KINDS), help="its layout; default: recognised")
    parser.add_argument("--samples", type=int, default=0, help="look at what a run would draw; default: at all")
    parser.add_argument("--seed", type=int, default=0, help="of that draw, and of random crops")
    parser.add_argument("--side", type=int, default=512, help="pixels at which judges see the pictures")
    parser.add_argument(
        "--judges", nargs="*", default=[], metavar="NAME=WHERE", help="as in the config: nudenet=nudenet"
    )
    parser.add_argument("--providers", default="cpu", help="of the judges: cpu or cuda")
    chosen = parser.parse_args(argv)
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
