"""The memory that a process keeps after it is freed."""

import platform
import subprocess
import sys

import pytest

from undo_core.io.memory_use import keep_freed_memory

FREE = """
import ctypes
import torch
from undo_core.io.memory_use import keep_freed_memory, return_freed_memory

class Heap(ctypes.Structure):  # mallinfo2 of malloc.h
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Heap
libc.mallopt(-1, 0)  # M_TRIM_THRESHOLD: nothing is kept

def free():
    kept = [torch.ones(1 << 20) for _ in range(32)]  # 128 MiB, as the activations of a step
    del kept
    return libc.mallinfo2().fordblks >> 20

free()  # the first blocks are mapped one by one, and raise the size from which glibc does so
print(free(), keep_freed_memory(), free(), return_freed_memory())
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or tuple(map(int, platform.libc_ver()[1].split("."))) < (2, 33),
    reason="only glibc has the setting, and mallinfo2 since 2.33",
)
def test_freed_memory_is_used_again_until_it_is_given_back():
    # glibc's own account, not the faults that the system counts: a sandbox counts none. The process first asks glibc to give everything
    # back, because what it keeps by itself differs from machine to machine; where a block above pins the heap it keeps even then.
    said = subprocess.run([sys.executable, "-c", FREE], capture_output=True, text=True, check=True).stdout.split()
    before, was_set, kept, returned = int(said[0]), said[1], int(said[2]), said[3]
    assert was_set == "True" and kept >= 128, (
        f"the process keeps the 128 MiB that it freed; without the setting it kept {before} MiB"
    )
    assert returned == "True", "a stage begins without what the one before has freed"


def test_a_threshold_that_the_user_has_set_is_kept(monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "262144")
    assert not keep_freed_memory()
