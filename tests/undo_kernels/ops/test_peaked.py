"""Logits of standard deviation 12 and 30: gradients as exact as plain PyTorch's in the same dtype, from the formula in float64."""

import pytest
import torch
import undo_kernels
from rounding import EXPONENTIAL, assert_as_exact_as, gamma
from vocab_losses import divergence

from undo_core import ops


@pytest.mark.parametrize("spread", [0.5, 12.0, 30.0])
@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize(("backend", "plan"), [("reference", "direct"), ("cpu", "chunk")])
def test_gradients_of_peaked_logits(backend, plan, kind, spread):
    generator = torch.Generator().manual_seed(0)
    z_s, z_t = (spread * torch.randn(64, 1024, generator=generator) for _ in range(2))

    def gradient(loss, dtype):
        z = z_s.to(dtype).requires_grad_()
        return torch.autograd.grad(loss(z, z_t.to(dtype)).sum(), z)[0]

    with undo_kernels.backend(backend), undo_kernels.recorded() as calls:
        got = gradient(lambda s, t: ops.kl_div(s, t, divergence=kind, reduction="none", plan=plan), torch.float32)
    assert {(c.backend, c.plan) for c in calls} == {(backend, plan)}
    want, plain = (gradient(lambda s, t: divergence(s, t, kind), dtype) for dtype in (torch.float64, torch.float32))
    # At least as exact as torch, up to the rounding of the result and of what it is a product of.
    assert_as_exact_as(got, plain, want, gamma(EXPONENTIAL), factor=1.0)
