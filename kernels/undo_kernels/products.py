"""Matrix products whose dtype is what the operands say, also inside ``torch.autocast``.

Autocast would run them in 16 bits: the logits of student and teacher would be rounded before they are subtracted, and what is left
of a small divergence is noise. It does so in the backward as well, where that runs inside the block.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A block in which autocast is off for ``device``; a device without autocast, as meta is, needs none."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


class Product(torch.autograd.Function):
    """``a @ b.T``, differentiable any number of times, each product in full precision."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(a, b)
        with full_precision(a.device):
            return a @ b.T

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        a, b = ctx.saved_tensors
        wants_a, wants_b = ctx.needs_input_grad
        return Product.apply(grad, b.T) if wants_a else None, Product.apply(grad.T, a.T) if wants_b else None
