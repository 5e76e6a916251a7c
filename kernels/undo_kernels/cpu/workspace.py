"""Scratch memory for tiles of logits, kept from one call to the next.

Newly allocated memory costs a page fault for every 4 KiB first written, a large part of the time of a call with a large
vocabulary (docs/findings/cpu-losses.md). Each thread keeps the largest workspace that it has used; ``release`` frees it.
"""

from __future__ import annotations

import threading

import torch


class _Kept(threading.local):
    buffer: torch.Tensor | None = None


_kept = _Kept()


def workspace(count: int) -> torch.Tensor:
    """Returns ``[count]`` float32 with arbitrary contents; the calling thread's next call reuses the memory."""
    if _kept.buffer is None or _kept.buffer.numel() < count:
        _kept.buffer = None  # frees the old buffer before the larger one is allocated
        _kept.buffer = torch.empty(count, dtype=torch.float32, device="cpu")
    return _kept.buffer[:count]


def release() -> None:
    """Frees the calling thread's workspace."""
    _kept.buffer = None
