"""Huge pages are asked for once, only where that changes anything, and the arrays of a program then have them."""

import os
import subprocess
import sys

import pytest

from spqr_jax.devices import huge_pages

HUGE = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
# Allocates 64 MiB as XLA does, touches them, and prints the arguments and the number of page faults.
PROGRAM = """
import ctypes, resource, sys
from spqr_jax.devices import huge_pages
if sys.argv[1] == "huge":
    huge_pages.restart()
libc = ctypes.CDLL(None)
libc.malloc.restype, size = ctypes.c_void_p, 64 * 2**20
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
ctypes.memset(libc.malloc(ctypes.c_size_t(size)), 1, size)
print(sys.argv[1:], resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    clean = {name: value for name, value in os.environ.items() if name != huge_pages.VARIABLE}
    command = [sys.executable, "-c", PROGRAM, mode, "two words"]
    printed = subprocess.run(command, env=clean, check=True, capture_output=True, text=True).stdout
    start, count = printed.rsplit(" ", 1)
    assert start == f"['{mode}', 'two words']"
    return int(count)


@pytest.mark.skipif(not huge_pages.setting({}), reason="the kernel gives no huge pages to those who ask")
def test_a_program_that_starts_again_touches_few_pages():
    small, huge = faults("small"), faults("huge")
    assert small > 16_000
    assert huge < small / 20


@pytest.fixture
def kernel(tmp_path, monkeypatch):
    switch = tmp_path / "enabled"
    monkeypatch.setattr(huge_pages, "KERNEL", switch)
    return switch


def test_other_settings_are_kept(kernel):
    kernel.write_text("always [madvise] never\n")
    assert huge_pages.setting({}) == HUGE
    assert huge_pages.setting({"GLIBC_TUNABLES": "a.b=1"}) == {"GLIBC_TUNABLES": "a.b=1:glibc.malloc.hugetlb=1"}


@pytest.mark.parametrize("value", ["glibc.malloc.hugetlb=1", "a.b=1:glibc.malloc.hugetlb=0"])
def test_a_setting_that_is_there_stays(kernel, value):
    kernel.write_text("always [madvise] never\n")
    assert huge_pages.setting({"GLIBC_TUNABLES": value}) == {}


@pytest.mark.parametrize("text", ["[always] madvise never\n", "always madvise [never]\n", None])
def test_nothing_is_done_where_the_kernel_does_not_ask(kernel, text):
    if text:
        kernel.write_text(text)
    assert huge_pages.setting({}) == {}
