"""Huge pages for the arrays of a CPU.

On a CPU, XLA takes the memory of a program from the C library at each call, and gives it back at the end. So Linux
hands out fresh pages of 4 KiB at each call, one at a time, when they are first touched. With pages of 2 MiB, a
fine-tuning step of a small model waits for a twentieth as many (docs/performance.md). The C library reads its settings
when a program starts, so a program that wants them has to start again. They change no result.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "GLIBC_TUNABLES"
SETTING = "glibc.malloc.hugetlb"
KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart() -> None:
    """Start this program again with huge pages, where that would change anything. Call it before any work.

    The process keeps its number, its arguments and its environment, to which `setting` is added.
    """
    if added := setting(os.environ):
        os.environ.update(added)
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def setting(environment: Mapping[str, str]) -> dict[str, str]:
    """What an environment lacks for huge pages: {variable: value}, or {} if the kernel gives none or all ask for them.

    A setting that is there, on or off, stays. C libraries other than glibc 2.35 and later ignore the variable.
    """
    present = environment.get(VARIABLE, "")
    if SETTING in present or not KERNEL.is_file() or "[madvise]" not in KERNEL.read_text():
        return {}
    return {VARIABLE: f"{present}:{SETTING}=1".lstrip(":")}
