"""The guard of a refactoring: does the package still compute the same, to the bit?

    python -m tests.guard write FILE   # before: everything that a small run makes, as JSON
    python -m tests.guard check FILE   # after each step: runs again and prints every difference; exit status 1 if any
    python -m tests.guard record       # when results change on purpose: what test_guard.py expects

`write` and `check` compare the bits of one machine; `record` keeps what other machines reproduce as well.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.guard.collect import collect, pictures, run
from tests.guard.compare import differences

EXPECTED = Path(__file__).with_name("expected.json")
PICTURES = Path(__file__).with_name("expected_pictures.npz")
SHOWN = 200


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.guard", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("write", "check", "record"))
    parser.add_argument("file", type=Path, nargs="?", help="JSON file that write makes and check reads")
    parser.add_argument(
        "--workdir", type=Path, help="new directory for the run, which is kept; default a temporary one"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        help="directory of compiled programs, for quick checks one after another; default an empty one each time",
    )
    arguments = parser.parse_args()
    if (arguments.file is None) != (arguments.command == "record"):
        parser.error(f"{arguments.command} takes {'no' if arguments.file else 'a'} FILE.")
    if arguments.workdir and arguments.workdir.exists():
        parser.error(f"--workdir {arguments.workdir} exists; the run must start from nothing.")
    before = json.loads(arguments.file.read_text()) if arguments.command == "check" else {}
    with tempfile.TemporaryDirectory() as folder:
        workdir = (arguments.workdir or Path(folder, "work")).absolute()
        start = time.time()
        run(workdir, (arguments.cache or Path(folder, "cache")).absolute())
        print(f"run: {time.time() - start:.0f} s", flush=True)
        found = collect(workdir)
        few = pictures(workdir)
    if arguments.command == "check":
        return _report(differences(before, found))
    if arguments.command == "write":
        _write(arguments.file, found)
        return 0
    del found["exact"]
    if EXPECTED.exists():
        _report(differences(json.loads(EXPECTED.read_text()), found))
    _write(EXPECTED, found)
    np.savez_compressed(PICTURES, **few)  # type: ignore[arg-type]
    return 0


def _report(lines: list[str]) -> int:
    for line in lines[:SHOWN]:
        print(line)
    if len(lines) > SHOWN:
        print(f"and {len(lines) - SHOWN} more")
    print(f"{len(lines)} differences" if lines else "no difference")
    return 1 if lines else 0


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
