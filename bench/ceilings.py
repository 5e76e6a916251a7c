"""Measures what the machine can do, in the same run as the contenders, and the floor for the time of a problem.

The floor of a problem is the longer of two times: that of the matrix products that every method needs, at the measured rate of
a large product of the same dtype; and that of reading each input and writing each gradient once, at the measured rate of a
copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import harness
import torch

ROUNDS = 5
SIDES = {"cpu": 2048, "cuda": 8192}  # size of the square matrices
COPIED = {"cpu": 1 << 28, "cuda": 1 << 30}  # bytes
MODES = ("forward", "both")


def measure(device: str, dtype: torch.dtype, quick: bool = False) -> dict[str, Any]:
    """Measures FLOP/s of a square product and bytes/s of a copy (read and written), each the best of a few rounds."""
    side, size = (512, 1 << 22) if quick else (SIDES[device], COPIED[device])
    a, b, c = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(3))
    source, target = (torch.ones(size // 4, dtype=torch.float32, device=device) for _ in range(2))
    steps = {"product": lambda: torch.mm(a, b, out=c), "copy": lambda: target.copy_(source)}
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for name, taken in harness.interleave(steps, ROUNDS, device):
        samples[name].append(taken)
    best = {name: min(times) for name, times in samples.items()}
    return {
        "flops": 2 * side**3 / best["product"],
        "bytes_per_s": 2 * size / best["copy"],
        "matrix_side": side,
        "copied_bytes": size,
        "samples_s": samples,
    }


def owed(tokens: int, vocabulary: int, width: int, itemsize: int, heads: int) -> dict[str, dict[str, float]]:
    """Returns the FLOPs and bytes that every method needs, forward and in both passes; ``heads``: 2 with a teacher, else 1."""
    product, matrix = 2.0 * tokens * vocabulary * width, float(itemsize) * width * (tokens + vocabulary)
    return {
        "forward": {"flops": heads * product, "bytes": heads * matrix},
        "both": {"flops": (heads + 2) * product, "bytes": (heads + 1) * matrix},
    }


def floor_seconds(row: Mapping[str, Any], mode: str = "both") -> float | None:
    """Returns the floor of a recorded row; None if the ceilings were not measured with it."""
    if "ceilings" not in row:
        return None
    work, rates = row["owed"][mode], row["ceilings"]
    return max(work["flops"] / rates["flops"], work["bytes"] / rates["bytes_per_s"])


def of_floor(row: Mapping[str, Any], record: Mapping[str, Any], mode: str = "both") -> float | None:
    """Returns the floor over a contender's median time; 1 is perfect."""
    floor, taken = floor_seconds(row, mode), harness.median(record, mode)
    return None if floor is None or taken is None else floor / taken


def achieved(row: Mapping[str, Any], record: Mapping[str, Any], mode: str = "both") -> float | None:
    """Returns the needed FLOPs over a contender's median time."""
    taken = harness.median(record, mode)
    return None if taken is None or "owed" not in row else row["owed"][mode]["flops"] / taken


def intensity(row: Mapping[str, Any], mode: str = "both") -> float | None:
    """Returns the needed FLOPs over the needed bytes."""
    return None if "owed" not in row else row["owed"][mode]["flops"] / row["owed"][mode]["bytes"]
