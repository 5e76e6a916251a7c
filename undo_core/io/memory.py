"""Peak memory of a stage."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch


def reset_peak() -> None:
    """Start measuring: forget the peaks so far, where the system allows it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # a container may forbid it; the peak then counts from the start of the process
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Largest device memory allocated (GPU) or resident memory of the process (CPU) since :func:`reset_peak`, in bytes; 0 on
    Windows, where neither ``/proc`` nor ``resource`` tells it."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM")


def resident_bytes() -> int:
    """Memory in use now, in bytes: allocated on the GPU, or resident in the process; 0 on Windows."""
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
