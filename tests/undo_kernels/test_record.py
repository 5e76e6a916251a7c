"""``undo_kernels.recorded``: every implementation reports itself from where it runs."""

import pytest
import torch
import undo_kernels
from undo_kernels.cpu.instruction_set import vectors
from undo_kernels.triton import vocab_loss as triton_loss
from vocab_losses import draw

from undo_core import ops

DEVICE = torch.device("cpu" if triton_loss.INTERPRETED else "cuda")
LARGE = (64, 8209)  # past the size at which the dispatcher leaves plain PyTorch


def inputs(rows, vocabulary):
    tensors = [t.to(DEVICE) for t in draw(rows, vocabulary, 8, 8)]
    return [t.requires_grad_(i < 2) for i, t in enumerate(tensors)]


def seen(calls):
    return [(c.op, c.backend, c.plan, c.gradient) for c in calls]


def test_a_small_problem_is_listed_under_plain_pytorch_whatever_was_asked_for():
    tensors = inputs(3, 70)
    for name in undo_kernels.library.backends.BACKENDS:
        with undo_kernels.backend(name), undo_kernels.recorded() as calls:
            ops.linear_kl_div(*tensors).backward()
        assert seen(calls) == [("vocab_loss", "reference", "direct", False), ("vocab_loss", "reference", "direct", True)]


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("plan", ["chunk", "recompute"])
def test_a_fused_call_names_backend_plan_and_size(backend, plan):
    tensors = [t.detach().cpu().requires_grad_(t.requires_grad) for t in inputs(*LARGE)] if backend == "cpu" else inputs(5, 33)
    rows, vocabulary = tensors[0].shape[0], tensors[1].shape[0]
    mask = torch.arange(rows, device=tensors[0].device) % 3 > 0
    with undo_kernels.backend(backend), undo_kernels.recorded() as calls:
        ops.linear_kl_div(*tensors, plan=plan, mask=mask).backward()
        ops.linear_kl_div(*tensors, plan=plan, reduction="none").sum().backward()
        ops.linear_kl_div(*(t.detach() for t in tensors), plan=plan)
    shared = ("vocab_loss", backend, plan)
    assert seen(calls) == [(*shared, True), (*shared, False), (*shared, True), (*shared, False)]
    assert calls[0].tokens == (int(mask.sum()) if backend == "cpu" else rows)
    assert {(c.tokens, c.vocabulary) for c in calls[1:]} == {(rows, vocabulary)}
    wanted = vectors() if backend == "cpu" else "interpreted" * triton_loss.INTERPRETED
    assert all(c.form.split("+")[0] == wanted for c in calls)


def test_the_plan_is_the_one_that_explain_names():
    shapes = {"student_hidden": (64, 8), "student_weight": (8209, 8), "teacher_hidden": (64, 8), "teacher_weight": (8209, 8)}
    tensors = [torch.zeros(shape, requires_grad=name.startswith("student")) for name, shape in shapes.items()]
    seen = set()
    with undo_kernels.backend("cpu"):
        for options in ({}, {"plan": "recompute"}, {"plan": "direct"}, {"plan": "direct", "workspace_bytes": 3 << 20}):
            with undo_kernels.recorded() as calls:
                ops.linear_kl_div(*tensors, **options)
            assert calls[0].plan == ops.explain("linear_kl_div", shapes, torch.float32, "cpu", **options).name
            seen.add(calls[0].plan)
    assert len(seen) == 4


def test_logits_that_are_overwritten():
    student, teacher = (torch.randn(64, 8209) for _ in range(2))
    with undo_kernels.backend("cpu"), undo_kernels.recorded() as calls:
        ops.kl_div(student.requires_grad_(), teacher, inplace_grad=True).backward()
    assert seen(calls) == [("vocab_loss", "cpu", "chunk", False), ("vocab_loss", "cpu", "inplace", True)]


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
def test_noise_and_rmu(backend):
    device = DEVICE if backend == "triton" else torch.device("cpu")
    hidden, target = torch.randn(3, 5, device=device, requires_grad=True), torch.randn(5, device=device)
    tensors = {"w": torch.zeros(4, 6, device=device), "b": torch.zeros(6, device=device)}
    with undo_kernels.backend(backend), undo_kernels.recorded() as calls:
        ops.rmu_loss(hidden, target).backward()
        ops.noise_(tensors, alpha=0.5, beta=1.0, seed=0)
    *rmu, noise = calls
    assert {(c.op, c.backend, c.tokens, c.vocabulary) for c in rmu} == {("rmu_loss", backend, 3, 5)}
    assert [c.gradient for c in rmu] == ([False, True] if backend == "reference" else [True])
    assert (noise.op, noise.backend, noise.plan, noise.tokens, noise.vocabulary) == ("noise_", backend, "inplace", 2, 30)


def test_blocks_nest_and_end():
    tensors = inputs(3, 70)
    with undo_kernels.recorded() as outer:
        ops.linear_kl_div(*tensors)
        with undo_kernels.recorded() as inner:
            ops.linear_kl_div(*tensors)
        loss = ops.linear_kl_div(*tensors)
    loss.backward()
    assert (len(outer), len(inner)) == (3, 1)


def test_a_compiled_graph_records_the_fused_op_alone():
    tensors = [t.detach().cpu().requires_grad_(t.requires_grad) for t in inputs(*LARGE)]
    compiled = torch.compile(lambda *t: ops.linear_kl_div(*t, plan="chunk"), backend="aot_eager", fullgraph=True)
    direct = torch.compile(lambda *t: ops.linear_kl_div(*t, plan="direct"), backend="aot_eager", fullgraph=True)
    with undo_kernels.backend("cpu"), undo_kernels.recorded() as calls:
        compiled(*tensors)
        compiled(*tensors)
        direct(*tensors)
    assert seen(calls) == [("vocab_loss", "cpu", "chunk", True)] * 2
