"""The weight's gradient is the largest thing that a loss makes: it must be handed to autograd, not copied."""

import gc

import pytest
import torch

from undo_core import ops


@pytest.mark.parametrize("plan", ["chunk", "recompute"])
def test_the_weights_gradient_is_handed_over_not_copied_or_kept(plan):
    weight, hidden = torch.randn(600, 32, requires_grad=True), torch.randn(70, 32, requires_grad=True)

    def alive() -> list[torch.Tensor]:
        plain = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.layout == torch.strided and not o.is_nested]
        return [o for o in plain if o.shape == weight.shape and o is not weight]

    gc.collect()
    gc.disable()  # a cycle would hold the gradient until the collector comes
    try:
        before = len(alive())
        ops.linear_cross_entropy(hidden, weight, torch.arange(70), plan=plan).backward()
        kept = {tensor.data_ptr() for tensor in alive()[before:]} - {weight.grad.data_ptr()}
    finally:
        gc.enable()
    assert not kept
