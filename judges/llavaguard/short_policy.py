"""Takes the benchmark's short policy out of a checkout of its authors' code, which is read and never run.

    python -m judges.llavaguard.short_policy CHECKOUT/spqr/metrics/robustness.py GRAPHS

writes GRAPHS/short_policy.txt, beside the graphs of LlavaGuard. A judge is then opened with policy="short".
"""

import argparse
import ast
import sys
from collections.abc import Sequence
from pathlib import Path

from judges.llavaguard import policies
from judges.session import JudgeError

CONSTANT = "LLAVAGUARD_POLICY"


def extract(source: Path) -> str:
    """The text of the constant in the Python file `source`, to the letter.

    Raises JudgeError if it is no Python file, lacks the constant, or holds a text other than the published one.
    """
    try:
        body = ast.parse(source.read_text(encoding="utf-8")).body
    except (OSError, UnicodeDecodeError, SyntaxError) as error:
        raise JudgeError(f"{source}: not a Python file that can be read ({error})") from None
    texts = [
        node.value.value
        for node in body
        if isinstance(node, ast.Assign)
        and [getattr(target, "id", "") for target in node.targets] == [CONSTANT]
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ]
    if len(texts) != 1:
        raise JudgeError(f"{source}: expected one text {CONSTANT}, found {len(texts)}; give spqr/metrics/robustness.py")
    if policies.sha256(texts[0]) != policies.SHORT_SHA256:
        raise JudgeError(f"{source}: its {CONSTANT} is not the published one; give the file of either edition")
    return texts[0]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Exit status 1, with one line of explanation, if the policy is not found."""
    parser = argparse.ArgumentParser(
        prog="python -m judges.llavaguard.short_policy", description=__doc__.splitlines()[0]
    )
    parser.add_argument("source", type=Path, help="spqr/metrics/robustness.py of the authors' repository")
    parser.add_argument("directory", type=Path, help="directory of LlavaGuard's graphs")
    flags = parser.parse_args(argv)
    place = flags.directory / policies.SHORT_FILE
    try:
        place.write_bytes(extract(flags.source).encode())
    except (JudgeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(place)
    return 0


if __name__ == "__main__":
    sys.exit(main())
