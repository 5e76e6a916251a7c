"""The memory of the logits' tiles, kept from one call to the next.

Fresh memory costs a page fault for every 4 KiB that is first written: a large part of a call where the vocabulary is
large (docs/findings/cpu-losses.md). Each thread keeps the largest workspace that it has used; ``release`` gives it back.
"""

from __future__ import annotations

import threading

import torch


class _Kept(threading.local):
    buffer: torch.Tensor | None = None


_kept = _Kept()


def workspace(count: int) -> torch.Tensor:
    """``[count]`` float32 with arbitrary contents, the calling thread's until its next call."""
    if _kept.buffer is None or _kept.buffer.numel() < count:
        _kept.buffer = None  # before the larger one is there
        _kept.buffer = torch.empty(count, dtype=torch.float32, device="cpu")
    return _kept.buffer[:count]


def release() -> None:
    """Give the calling thread's workspace back."""
    _kept.buffer = None
