"""Philox-4x32-10: a counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

A word depends only on its key and counter, so a tensor's noise is the same on any device, in any sharding and order::

    key      seed, low word; seed, high word
    counter  block, low word; block, high 24 bits | stream << 24; name hash, low word; name hash, high word
    block = flat index // 4, lane = flat index % 4, name hash = first 8 bytes, little-endian, of SHA-256 of the name

Stream 0 gives the noise, stream 1 the stochastic rounding.
"""

from __future__ import annotations

import torch

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF

DRAW, ROUND = 0, 1


def philox_4x32_10(counter: tuple[torch.Tensor, ...], key: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """Returns four words for every counter, as int64 tensors with values in [0, 2**32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1  # wraps modulo 2**64, which keeps every bit of the 64-bit product
        c0, c1, c2, c3 = (p1 >> 32 & _LOW) ^ c1 ^ k0, p1 & _LOW, (p0 >> 32 & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


def words(seed: int, hashed: int, stream: int, start: int, count: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Returns the words of the flat indices from ``start``, ``[count]`` int64; uses 32 bytes of temporaries per word."""
    first, last = start // 4, (start + count + 3) // 4
    block = torch.arange(first, last, dtype=torch.int64, device=device)
    counter = (
        block & _LOW,
        block >> 32 & 0xFFFFFF | stream << 24,
        torch.full_like(block, hashed & _LOW),
        torch.full_like(block, hashed >> 32),
    )
    lanes = torch.stack(philox_4x32_10(counter, (seed & _LOW, seed >> 32 & _LOW)), dim=1)
    return lanes.view(-1)[start - 4 * first : start - 4 * first + count]
