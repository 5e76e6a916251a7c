"""Where a kernel is launched: Triton takes the current device, whatever its pointers' is."""

from __future__ import annotations

import contextlib

import torch


def current(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes a GPU the current one for a while; nothing for the interpreter's tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
