"""system/allocator.py: what is freed is used again, without the system's help."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from sfumato.system.allocator import keep_freed_memory
torch.set_num_threads(1)
if "keep" in sys.argv:
    assert keep_freed_memory()
def work(times):
    for _ in range(times):
        parts = [torch.ones(9 << 20) for _ in range(2)]
work(30)  # until the blocks lie one behind the other
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work(4)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc, whose allocator this sets")
def test_memory_that_was_freed_is_used_again() -> None:
    def faults(*arguments: str) -> int:
        result = subprocess.run([sys.executable, "-c", FAULTS, *arguments], capture_output=True, text=True, check=True)
        return int(result.stdout)

    assert faults("keep") < 50 < 150 < faults()  # 8 blocks of 36 MB: a fault for each page of them, or each huge page
