"""Measures current and peak memory, on the GPU or of the process, and says how much freed memory the process keeps."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
KEPT, MAPPED = 256 << 20, 32 << 20  # bytes; glibc itself raises the second up to 32 MiB


def keep_freed_memory() -> bool:
    """Lets this process keep up to 256 MiB that it has freed, for its next allocations; returns whether it could be set.

    By default glibc returns the memory of a training step's activations to the system when they are freed, so that the next step
    finds fresh pages, each of which the system has to clear: 7 % of the time of a step of the demo. Only glibc has this setting. A user who has set
    ``MALLOC_MMAP_THRESHOLD_`` in the environment, so that freed tensors are returned, keeps that.
    """
    if not sys.platform.startswith("linux") or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and all(mallopt(*one) == 1 for one in ((M_MMAP_THRESHOLD, MAPPED), (M_TRIM_THRESHOLD, KEPT)))


def return_freed_memory() -> bool:
    """Gives the memory that this process has freed and kept back to the system, in some 40 ms for each GB; returns whether there was any.

    Only glibc can. Without it a worker starts a stage with what the largest stage before left on its heap: after three trainings of a
    model of 44 M parameters 1,450 MB of resident memory stay, of which 510 are in use.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None  # musl has none
    return trim is not None and trim(0) == 1


def reset_peak() -> None:
    """Resets the peaks that :func:`peak_bytes` reports, if the system allows it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # a container may forbid this; the peak then counts from the start of the process
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Returns the peak memory since :func:`reset_peak`, in bytes.

    It is the allocated memory of the GPU, if there is one, else the resident memory of the process; 0 on Windows without a GPU,
    which has neither ``/proc`` nor ``resource``.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM")


def resident_bytes() -> int:
    """Returns the memory in use, in bytes: allocated on the GPU, if there is one, else resident; 0 on Windows without a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return _status("VmRSS")


def _status(field: str) -> int:
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
