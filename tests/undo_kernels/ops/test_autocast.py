"""``torch.autocast`` changes no bit of any op: values, gradients with a backward inside the block, noise."""

import pytest
import torch
import undo_kernels
from rounding import assert_as_exact_as, probability_error
from undo_kernels.triton import vocab_loss as triton_loss

from undo_core import ops

DEVICE = torch.device("cpu" if triton_loss.INTERPRETED else "cuda")
ROWS, VOCABULARY, WIDTH = 3, 70, 8


def inputs(device):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(device)  # noqa: E731
    h, w, b = draw(ROWS, WIDTH), draw(VOCABULARY, WIDTH), draw(VOCABULARY)
    near = h + 1e-2 * draw(ROWS, WIDTH)
    labels = torch.arange(ROWS, device=device)
    indices = torch.arange(ROWS * 5, device=device).view(ROWS, 5)
    logprobs = (near @ w.T).log_softmax(-1).gather(-1, indices)
    return h, w, b, near, labels, indices, logprobs, (near @ w.T).bfloat16()


def results(tensors, plan):
    """Every op's value and gradients, by name."""
    h, w, b, near, labels, indices, logprobs, teacher = tensors
    known = "chunk" if plan == "recompute" else plan  # the one plan that every backend has for a sparse teacher
    calls = {
        divergence: lambda h, w, b, d=divergence: ops.linear_kl_div(
            h, w, near, w.detach(), student_bias=b, teacher_bias=b.detach(), divergence=d, plan=plan
        )
        for divergence in ("forward", "reverse", "jsd")
    }
    calls |= {
        tail: lambda h, w, b, t=tail: ops.linear_sparse_kl_div(h, w, indices, logprobs, bias=b, tail=t, plan=known)
        for tail in ("bucket", "renormalize")
    }
    calls |= {
        "uniform": lambda h, w, b: ops.linear_uniform_kl(h, w, bias=b, plan=plan),
        "cross-entropy": lambda h, w, b: ops.linear_cross_entropy(h, w, labels, bias=b, plan=plan),
        "lse": lambda h, w, b: ops.linear_lse(h, w, bias=b, plan=plan).sum(),
        "logits": lambda h, w, b: ops.kl_div(b + h[:, :1] * w[:, 0], teacher, plan=plan),
        "rmu": lambda h, w, b: ops.rmu_loss(h, w[0]) + 0 * (w.sum() + b.sum()),
    }
    out = {}
    for name, call in calls.items():
        leaves = [t.clone().requires_grad_() for t in (h, w, b)]
        loss = call(*leaves)
        loss.backward()
        out[name] = [loss.detach(), *(leaf.grad for leaf in leaves)]
    noised = {"w": w.clone(), "b": b.bfloat16()}
    ops.noise_(noised, alpha=0.5, beta=1.0, seed=3)
    return out | {"noise": list(noised.values())}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(
    ("backend", "plan"),
    [("reference", "direct"), ("cpu", "chunk"), ("cpu", "recompute"), ("triton", "chunk"), ("triton", "recompute")],
)
def test_no_bit_changes(backend, plan):
    device = DEVICE if backend == "triton" else torch.device("cpu")
    with undo_kernels.backend(backend), undo_kernels.recorded() as calls:
        tensors = inputs(device)
        wanted = results(tensors, plan)
        with torch.autocast(device.type, torch.bfloat16):
            got = results(tensors, plan)
    assert {c.backend for c in calls} == {backend}
    for name, tensors in wanted.items():
        for which, (a, b) in enumerate(zip(got[name], tensors, strict=True)):
            assert a.dtype == b.dtype and torch.equal(a, b), (name, which)


def test_a_compiled_plain_loss_under_autocast():
    generator = torch.Generator().manual_seed(0)
    h, w, t = (torch.randn(*shape, generator=generator) for shape in ((ROWS, WIDTH), (VOCABULARY, WIDTH), (ROWS, WIDTH)))
    leaves = [h.requires_grad_(), w.requires_grad_()]
    call = lambda h, w: ops.linear_kl_div(h, w, t, w.detach(), plan="direct")  # noqa: E731
    plain = torch.autograd.grad(call(*leaves), leaves)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wanted = torch.autograd.grad(ops.linear_kl_div(*wide, t.double(), wide[1].detach(), plan="direct"), wide)
    with torch.autocast("cpu", torch.bfloat16):
        loss = torch.compile(call, backend="aot_eager", fullgraph=True)(*leaves)
    for got, same, want in zip(torch.autograd.grad(loss, leaves), plain, wanted, strict=True):
        assert_as_exact_as(got, same, want, probability_error(h, w))


def test_a_device_without_autocast():
    """The planner counts memory on meta tensors."""
    hidden = torch.randn(3, 8, device="meta", requires_grad=True)
    weight = torch.randn(20, 8, device="meta")
    with undo_kernels.backend("reference"):
        ops.linear_kl_div(hidden, weight, hidden, weight).backward()
    assert hidden.grad.shape == (3, 8) and hidden.grad.device.type == "meta"
