"""Peak memory of a stage."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch


def reset_peak() -> None:
    """Start measuring: forget the peaks so far, where the system allows it."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # a container may forbid it; the peak then counts from the start of the process
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Largest device memory allocated (GPU) or resident memory of the process (CPU) since :func:`reset_peak`, in bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM")


def resident_bytes() -> int:
    """Memory in use now, in bytes: allocated on the GPU, or resident in the process."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return _status("VmRSS")


def _status(field: str) -> int:
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
