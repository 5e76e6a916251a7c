"""Measures current and peak memory, on the GPU or of the process."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch


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
