"""Matrix products in the dtype of their operands, even inside ``torch.autocast``.

Autocast would compute them in 16 bits. It would round the logits of student and teacher before they are subtracted, and a small
divergence would be lost in the rounding. The same holds for a backward that runs inside the autocast block.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Returns a context manager that turns autocast off for ``device``, and does nothing where there is none (meta)."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


class Product(torch.autograd.Function):
    """Computes ``a @ b.T`` with autocast off in the forward and in every backward; differentiable any number of times."""

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
