"""Memory that is kept from one call to the next: scratch memory for tiles of logits, and gradients of large weights.

Newly allocated memory costs a page fault for every 4 KiB first written, a large part of the time of a call with a large
vocabulary (docs/findings/cpu-losses.md). ``release`` frees what is kept.
"""

from __future__ import annotations

import ctypes
import threading
import weakref

import torch

LEAST_BYTES = 16 << 20  # malloc keeps smaller blocks by itself


class _Kept(threading.local):
    buffer: torch.Tensor | None = None


_kept = _Kept()
# Memory of gradients that no tensor uses any more, by its bytes. Threads share it without a lock, which a forked process could inherit
# locked: a list's append and pop are atomic, and what two threads do at the same time costs new memory at worst.
_unused: dict[int, list[torch.Tensor]] = {}


def workspace(count: int) -> torch.Tensor:
    """Returns ``[count]`` float32 with arbitrary contents; the calling thread's next call reuses the memory."""
    if _kept.buffer is None or _kept.buffer.numel() < count:
        _kept.buffer = None  # frees the old buffer before the larger one is allocated
        _kept.buffer = torch.empty(count, dtype=torch.float32, device="cpu")
    return _kept.buffer[:count]


def reusable(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """Returns a tensor with arbitrary contents, whose memory a later call gives out again once no tensor uses it.

    A training step frees its gradients, and the next one needs as many of the same sizes. Unused memory of other sizes is freed
    before more is allocated, so that no more is kept than was in use at one time.
    """
    size = shape.numel() * dtype.itemsize
    if size < LEAST_BYTES:
        return torch.empty(shape, dtype=dtype, device="cpu")
    try:
        memory = _unused[size].pop()
    except (KeyError, IndexError):
        _unused.clear()
        memory = torch.empty(size, dtype=torch.uint8, device="cpu")
    # The tensor's storage holds the array until the last tensor or graph that shares it is gone.
    array = (ctypes.c_char * size).from_address(memory.data_ptr())
    weakref.finalize(array, _keep, memory, _unused).atexit = False
    return torch.frombuffer(array, dtype=dtype).resize_(shape)  # a view would keep autograd from adding to it in place


def _keep(memory: torch.Tensor, among: dict[int, list[torch.Tensor]]) -> None:
    """Keeps memory that nothing uses any more, unless :func:`release` was called since it was given out."""
    if among is _unused:
        among.setdefault(memory.nbytes, []).append(memory)


def release() -> None:
    """Frees the calling thread's workspace and the memory of gradients: of those still in use once nothing uses them."""
    global _unused
    _kept.buffer = None
    _unused = {}
