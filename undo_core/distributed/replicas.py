"""Losses of your own on a model that DistributedDataParallel replicates."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn
from torch.nn.parallel import DistributedDataParallel

Result = TypeVar("Result")


def in_forward(model: nn.Module, function: Callable[[nn.Module], Result]) -> Result:
    """Returns ``function`` of the model inside ``model``; with DDP, it runs within the forward pass of the wrapper.

    DDP averages the gradients over the processes only after a forward pass of its own. A loss that is made from the inner model
    outside of it leaves each process with its own gradients, without an error. A model without a wrapper is handed on as it is.

    Args:
        model: a model, or one that ``DistributedDataParallel`` wraps.
        function: returns tensors of which a loss is made, such as the loss itself.

    Raises:
        ValueError: another wrapper, such as FSDP or DeepSpeed, whose parameters are not whole here.
    """
    wrapper = getattr(model, "_orig_mod", model)  # of torch.compile
    if not isinstance(wrapper, DistributedDataParallel):
        if isinstance(getattr(wrapper, "module", None), nn.Module):
            raise ValueError(
                f"model: got a {type(wrapper).__name__} around a model, wanted a model, or DistributedDataParallel around it"
            )
        return function(model)
    inner = wrapper.module
    held = vars(inner).get("forward")  # accelerate puts one there for its autocast

    def restore() -> None:
        vars(inner).pop("forward", None)
        if held is not None:
            inner.forward = held

    def once() -> Result:
        restore()
        return function(inner)

    inner.forward = once
    try:
        return wrapper()
    finally:
        restore()
