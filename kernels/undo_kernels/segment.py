"""What the noise works on: pieces of memory, and the elements of a parameter that each of them holds.

A whole parameter is one segment. A shard, or a checkpoint's part of a stacked parameter, is one whose elements are found in the
full parameter by ``index``; so the noise of an element, which depends on that index, is the same in any cut.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class Segment:
    """``theta <- keep * theta + scale * N`` on one tensor.

    Attributes:
        tensor: contiguous; float32, bfloat16, float16 or float64.
        name: the parameter's canonical name, which with the seed and the flat index decides ``N``.
        law: what ``N`` is, in units of ``scale``: ``uniform``, an odd integer in (-2**24, 2**24); ``normal``, a standard normal;
            ``constant``, 1.
        keep: ``1 - alpha``.
        scale: ``alpha * beta * limit / 2**24``, ``alpha * beta * std`` or ``alpha * target``.
        first: flat index, in the full parameter, of the tensor's first element.
        run: elements that follow each other in the full parameter as they do here; 0 for all of them.
        stride: flat distance, in the full parameter, between the starts of two runs.
    """

    tensor: torch.Tensor
    name: str
    law: Literal["uniform", "normal", "constant"]
    keep: float
    scale: float
    first: int = 0
    run: int = 0
    stride: int = 0

    @property
    def hashed(self) -> int:
        """64-bit hash of the name."""
        return name_hash(self.name)

    def runs(self) -> list[tuple[int, int, int]]:
        """``(offset here, flat index there, elements)`` of each run."""
        count = self.tensor.numel()
        length = self.run or count
        return [
            (at, self.first + i * self.stride, min(length, count - at)) for i, at in enumerate(range(0, count, max(length, 1)))
        ]


def elements(segments: Sequence[Segment]) -> int:
    """Number of elements of all segments."""
    return sum(segment.tensor.numel() for segment in segments)


def amplitude(law: str, shape: Sequence[int], std: float | None = None, *, stacked: bool = False) -> float:
    """Scale of ``N`` in double: what multiplies the odd integer (xavier_uniform) or the standard normal (the other laws).

    Xavier's ``limit = sqrt(6 / (fan_in + fan_out))`` and ``std = sqrt(2 / (fan_in + fan_out))``. Of a matrix ``[out, in]`` the fans
    are its extents. Further extents are a receptive field, as ``torch.nn.init`` has it: ``fan_in = shape[1] * r``,
    ``fan_out = shape[0] * r``; or, ``stacked``, the last two are a matrix and those before count matrices of their own (experts).
    """
    if law == "normal":
        return float(std)
    fans = shape[-1] + shape[-2] if stacked else (shape[0] + shape[1]) * math.prod(shape[2:])
    return math.sqrt(6.0 / fans) / 2.0**24 if law == "xavier_uniform" else math.sqrt(2.0 / fans)


def name_hash(name: str) -> int:
    """64-bit hash of a canonical parameter name: the first 8 bytes, little-endian, of its SHA-256."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
