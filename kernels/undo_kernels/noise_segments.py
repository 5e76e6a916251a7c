"""Segments: tensors that the noise is added to, with the position of their elements in the full parameter.

A whole parameter is one segment; so is a shard, or one slice of a stacked parameter in a checkpoint. An element's noise depends
on its flat index in the full parameter, so it is the same however the parameter is split.
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
    """One tensor to be updated by ``theta <- keep * theta + scale * N``.

    Attributes:
        tensor: contiguous; float32, bfloat16, float16 or float64.
        name: the parameter's canonical name; ``N`` is a function of the seed, this name and the flat index.
        law: what ``N`` is, in units of ``scale``: ``uniform``, an odd integer in (-2**24, 2**24); ``normal``, a standard
            normal; ``constant``, 1; ``elements``, the matching element of ``target``.
        keep: ``1 - alpha``.
        scale: ``alpha * beta * limit / 2**24``, ``alpha * beta * std``, ``alpha * value`` (constant) or ``alpha`` (elements).
        first: flat index, in the full parameter, of the tensor's first element.
        run: number of elements that are contiguous both in the tensor and in the full parameter; 0: all of them.
        stride: distance, in elements of the full parameter, between the starts of successive runs.
        target: for the law ``elements``: a float tensor with the full parameter's elements, on any device.
    """

    tensor: torch.Tensor
    name: str
    law: Literal["uniform", "normal", "constant", "elements"]
    keep: float
    scale: float
    first: int = 0
    run: int = 0
    stride: int = 0
    target: torch.Tensor | None = None

    @property
    def hashed(self) -> int:
        """Returns :func:`name_hash` of the name."""
        return name_hash(self.name)

    def runs(self) -> list[tuple[int, int, int]]:
        """Returns ``(offset in the tensor, flat index in the full parameter, number of elements)`` of each run."""
        count = self.tensor.numel()
        length = self.run or count
        return [
            (at, self.first + i * self.stride, min(length, count - at)) for i, at in enumerate(range(0, count, max(length, 1)))
        ]


def elements(segments: Sequence[Segment]) -> int:
    """Returns the total number of elements of the segments."""
    return sum(segment.tensor.numel() for segment in segments)


def amplitude(law: str, shape: Sequence[int], std: float | None = None, *, stacked: bool = False) -> float:
    """Returns the factor, in float64, of the odd integer (xavier_uniform) or of the standard normal (the other laws).

    Xavier: ``limit = sqrt(6 / (fan_in + fan_out))`` and ``std = sqrt(2 / (fan_in + fan_out))``. The fans of a matrix
    ``[out, in]`` are its dimensions. Further dimensions are a receptive field of ``r`` elements, as in ``torch.nn.init``:
    ``fan_in = shape[1] * r``, ``fan_out = shape[0] * r``. With ``stacked``, the last two dimensions are a matrix and the
    leading ones count matrices (experts).
    """
    if law == "normal":
        return float(std)
    fans = shape[-1] + shape[-2] if stacked else (shape[0] + shape[1]) * math.prod(shape[2:])
    return math.sqrt(6.0 / fans) / 2.0**24 if law == "xavier_uniform" else math.sqrt(2.0 / fans)


def name_hash(name: str) -> int:
    """Returns the 64-bit hash of a canonical parameter name: the first 8 bytes of its SHA-256, little-endian."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
