"""Selection of the GPU for a launch: Triton uses the current device, not that of the tensors."""

from __future__ import annotations

import contextlib

import torch


def current(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes ``device`` the current GPU inside the block; does nothing for CPU tensors (the interpreter)."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
