"""The memory that a process keeps after it is freed."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from undo_core.io.memory_use import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        kept = [torch.ones(1 << 20) for _ in range(32)]  # 128 MiB, as the activations of a step
        del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
print(faults(), keep_freed_memory(), faults() and faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the setting")
def test_freed_memory_is_used_again():
    said = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True).stdout.split()
    default, was_set, kept = int(said[0]), said[1], int(said[2])
    assert was_set == "True" and 10 * kept < default, "4 times 128 MiB have 131,072 pages of 4 KiB"
