"""The memory plan that a compiler writes down before it generates machine code.

XLA optimises a program, lays out its memory, and then generates code. libtpu takes by far the most time for the last
part, which changes nothing in the plan. With `xla_dump_to` XLA writes the plan to a folder as soon as it is made.
"""

import re
from pathlib import Path
from typing import NamedTuple

DUMP = "xla_dump_to"  # the compiler's option that names the folder
# A line of the plan: "allocation 7: size 512, page 0, output shape is |f32[8]|, maybe-live-out, parameter 2, ..."
ALLOCATION = re.compile(r"^allocation \d+: size (\d+), (.*)$", re.MULTILINE)
# XLA's own sum of the same, in its report.
TOTAL = re.compile(r"\(color=0\)\nTotal bytes: (\d+) ")
PLAN, REPORT = "*after_optimizations-buffer-assignment.txt", "*after_optimizations-memory-usage-report.txt"
PROGRAM = "*after_optimizations.txt"


class Planned(NamedTuple):
    """What a compiler wrote down: bytes by kind, and the text of the optimised program.

    parts: bytes of "arguments", "outputs", "temporaries" and "aliased" as those of memory_analysis().
    """

    parts: dict[str, int]
    program: str


def read(folder: Path) -> Planned | None:
    """The plan in a folder, None as long as it is not whole: the compiler may be writing it at this moment.

    Of several programs the largest counts: compilers make small ones on their way. A plan is whole if its sum is that
    of XLA's report, and a program if its last computation, the entry, is closed.
    """
    plan, report, program = (_largest(folder, pattern) for pattern in (PLAN, REPORT, PROGRAM))
    found, said = parts(plan), TOTAL.search(report)
    whole = said is not None and total(found) == int(said[1])
    closed = "\nENTRY " in program and program.rstrip().endswith("\n}")
    return Planned(found, program) if whole and closed else None


def total(parts: dict[str, int]) -> int:
    """Bytes of everything, aliased ones once."""
    return parts["arguments"] + parts["outputs"] + parts["temporaries"] - parts["aliased"]


def _largest(folder: Path, pattern: str) -> str:
    """The text of the largest file of this kind, "" if there is none."""
    files = sorted(folder.glob(pattern), key=lambda file: file.stat().st_size)
    return files[-1].read_text(encoding="utf-8") if files else ""


def parts(plan: str) -> dict[str, int]:
    """Bytes by kind from the text of a plan."""
    found = dict.fromkeys(("arguments", "outputs", "temporaries", "aliased"), 0)
    for size, what in ALLOCATION.findall(plan):
        if re.search(r"\bcolor [1-9]", what):
            continue  # memory on the chip itself
        argument, output = "parameter " in what, "maybe-live-out" in what
        for name, counts in (
            ("arguments", argument),
            ("outputs", output),
            ("aliased", argument and output),
            ("temporaries", not (argument or output)),
        ):
            found[name] += int(size) * counts
    return found
