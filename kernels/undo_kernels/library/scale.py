"""``undo::scale_(gradient, factor)``: multiplies a gradient by a device scalar in place, without the host reading the scalar.

The forward of a loss computes its gradients, and the backward scales them by what arrived.
"""

from __future__ import annotations

import torch

torch.library.define("undo::scale_", "(Tensor(a!) gradient, Tensor factor) -> ()")


@torch.library.impl("undo::scale_", ("cpu", "cuda"))
def _scale_(gradient: torch.Tensor, factor: torch.Tensor) -> None:
    if factor.device.type == "cpu" and float(factor) == 1.0:  # on a GPU the host would have to wait for the value
        return
    gradient.mul_(factor)


@torch.library.register_fake("undo::scale_")
def _fake(gradient: torch.Tensor, factor: torch.Tensor) -> None:
    return None


def is_eager(tensor: torch.Tensor) -> bool:
    """Returns whether ``tensor`` is a real tensor, and not a stand-in of a graph that is being traced."""
    return type(tensor) is torch.Tensor


def scaled(gradient: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Returns a saved gradient times ``factor`` in ``dtype``, the input's; a real tensor is scaled in place."""
    if is_eager(gradient):
        torch.ops.undo.scale_(gradient, factor)
        torch.autograd.graph.increment_version(gradient)  # so that a second backward through the graph raises
    else:  # a traced graph reuses memory by itself
        gradient = gradient * factor
    return gradient.to(dtype)


def refuse_double_backward(op: str) -> None:
    """Raises a ``RuntimeError`` inside a backward that is to be differentiated again (``create_graph=True``)."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"undo::{op}: its gradient was computed in the forward and cannot be differentiated again (create_graph=True); "
            'use undo_kernels.backend("reference") for second derivatives'
        )
