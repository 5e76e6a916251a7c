"""The losses as torch.library ops: opcheck, compiled graphs, autograd's rules, checkpointing, autocast."""

import functools
import math

import pytest
import torch
from rounding import assert_as_exact_as, probability_error
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from undo_kernels.library.vocab_loss import arguments
from undo_kernels.problem import TARGETS, Problem
from undo_kernels.projection import GivenLogits, Projection

from undo_core import ops

CHUNK = {"plan": "chunk"}  # the vocabularies here would take plain PyTorch on their own


def draw(rows=7, vocabulary=53, width=5, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, width), (vocabulary, width), (rows, width), (vocabulary, width))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def problem(target, needs=(True, True, True), **extra):
    h, w, th, tw = draw()
    bias = torch.linspace(-1, 1, 53, requires_grad=needs[2])
    student = Projection(h.requires_grad_(needs[0]), w.requires_grad_(needs[1]), bias, 0.7, 4.0, 1.3, 50)
    given = {"student": student, "target": target, "factor": torch.linspace(0.1, 1, 7), "needs": needs, "plan": "chunk"}
    if target in ("forward", "reverse", "jsd"):
        given["teacher"] = Projection(th, tw, None, 1.0, None, 1.3, 50)
    if target in ("bucket", "renormalize"):
        given["indices"] = torch.arange(21).view(7, 3)
        given["logprobs"] = torch.full((7, 3), -2.0)
    return Problem(**{**given, **extra})


@pytest.mark.parametrize("target", TARGETS)
def test_opcheck(target):
    labels = {"label_factor": torch.ones(7), "labels": torch.arange(7)} if target in ("own", "forward") else {}
    p = problem(target, counted=torch.tensor([1, 1, 0, 1, 1, 1, 1]).bool(), statistics=target == "forward", **labels)
    torch.library.opcheck(torch.ops.undo.vocab_loss.default, *arguments(p, "cpu"))
    torch.library.opcheck(torch.ops.undo.vocab_loss_tokens.default, *arguments(p, "cpu"))


def test_opcheck_of_the_ops_that_write():
    logits = torch.randn(4, 9)
    p = Problem(student=GivenLogits(logits, logits), target="uniform", factor=torch.ones(4), needs=(True, False, False))
    torch.library.opcheck(torch.ops.undo.vocab_loss_logits_.default, *arguments(p, "cpu"))
    torch.library.opcheck(torch.ops.undo.scale_.default, (torch.randn(3), torch.tensor(2.0)))


@pytest.mark.parametrize("plan", ["chunk", "direct"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_to_one_graph(reduction, plan):
    h, w, th, tw = draw()
    mask, labels = torch.tensor([1, 0, 1, 1, 1, 0, 1]).bool(), torch.arange(7)

    def loss(h, w):
        kl = ops.linear_kl_div(
            torch.tanh(h),
            w,
            th,
            tw,
            mask=mask,
            labels=labels,
            label_weight=0.3,
            student_softcap=5.0,
            reduction=reduction,
            plan=plan,
        )
        return (kl * 2).sum() + ops.linear_cross_entropy(h, w, labels, mask=mask, plan=plan)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss, compiled):
        inputs = [h.clone().requires_grad_(), w.clone().requires_grad_()]
        value = function(*inputs)
        results.append((value, *torch.autograd.grad(value, inputs)))
    for plain, graph in zip(*results, strict=True):
        # the same operations in the same order, but for what the compiler may fuse of those beside the loss
        assert_as_exact_as(graph, plain, plain, probability_error(h, w))


def test_compiles_to_one_graph_for_all_sizes_and_options():
    """Sizes and numbers are symbols in such a graph: the checks of the arguments may compare them, and print them only to refuse."""

    def loss(h, w, number):
        indices, labels = torch.arange(2).expand(len(h), 2), torch.zeros(len(h), dtype=torch.long)
        common = {"temperature": number, "scale": number, "softcap": 10 * number, "normalizer": number, "plan": "chunk"}
        ce = ops.linear_cross_entropy(h, w, labels, mask=labels == 0, **common)
        return (
            ce
            + ops.linear_sparse_kl_div(h, w, indices, torch.full(indices.shape, -1.0), **common)
            + ops.rmu_loss(h, w[0], coefficient=number)
        )

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="eager")
    for rows, number in ((7, 1.5), (3, 2.5)):
        h, w, _, _ = draw(rows)
        assert torch.equal(compiled(h, w, number), loss(h, w, number))


def test_inductor_keeps_a_small_divergence():
    """The plain path becomes part of the graph, and Inductor replaces expm1 by exp(x) - 1."""
    generator = torch.Generator().manual_seed(0)
    z_t = torch.randn(5, 40, generator=generator) * 2
    z_s = z_t + 1e-3 * torch.randn(5, 40, generator=generator)
    log_s, log_t = (z.double().log_softmax(-1) for z in (z_s, z_t))
    log_m = torch.logaddexp(log_s, log_t) - math.log(2)
    of = lambda p, q: (p.exp() * (p - q)).sum(-1).mean()  # noqa: E731
    want = {"forward": of(log_t, log_s), "reverse": of(log_s, log_t), "jsd": (of(log_t, log_m) + of(log_s, log_m)) / 2}
    assert all(1e-8 < value < 1e-6 for value in want.values())
    call = torch.compile(lambda s, t: [ops.kl_div(s, t, divergence=name, plan="direct") for name in want], fullgraph=True)
    got = call(z_s, z_t)
    for name, value in zip(want, got, strict=True):
        assert value >= 0 and abs(value - want[name]) < 1e-3 * want[name], name  # the contract's bound of the loss


def test_gradients_come_only_where_they_are_asked_for():
    h, w, th, tw = draw()
    seen = []
    original = torch.ops.undo.vocab_loss

    for needs in ((True, False), (False, True), (False, False)):
        inputs = [h.clone().requires_grad_(needs[0]), w.clone().requires_grad_(needs[1])]
        problem = Problem(Projection(*inputs), "uniform", torch.ones(7), needs=(*needs, False))
        tensors, options = arguments(problem, "cpu")
        results = original(*tensors, **options)
        seen.append(tuple(bool(t.numel()) for t in results[-3:]))
    assert seen == [(True, False, False), (False, True, False), (False, False, False)]
    with torch.no_grad():
        assert not ops.linear_kl_div(h.requires_grad_(), w, th, tw, **CHUNK).requires_grad
    teacher = [th.requires_grad_(), tw.requires_grad_()]
    loss = ops.linear_kl_div(h, w.requires_grad_(), *teacher, **CHUNK)
    assert torch.autograd.grad(loss, teacher, allow_unused=True) == (None, None)


def test_a_second_backward_and_a_double_backward_are_refused():
    h, w, th, tw = draw()
    h.requires_grad_()
    loss = ops.linear_kl_div(h, w, th, tw, **CHUNK)
    (loss * 2).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace operation"):
        (loss * 2).backward()
    loss = ops.linear_kl_div(h, w, th, tw, **CHUNK)
    torch.autograd.grad(loss, h, retain_graph=True)  # by 1 there is nothing to scale, but the gradient is handed out
    with pytest.raises(RuntimeError, match="inplace operation"):
        torch.autograd.grad(loss * 2, h)
    for reduction in ("mean", "none"):
        loss = ops.linear_kl_div(h, w, th, tw, reduction=reduction, **CHUNK).sum()
        with pytest.raises(RuntimeError, match=r"undo::vocab_loss.*differentiated again"):
            torch.autograd.grad(loss, h, create_graph=True)


def gradients_of(tensors, factor, dtype):
    """Of the plain way."""
    h, w, th, tw = (t.detach().to(dtype) for t in tensors)
    inputs = [h.requires_grad_(), w.requires_grad_()]
    return torch.autograd.grad(ops.linear_kl_div(*inputs, th, tw, plan="direct") * factor, inputs)


def test_grad_output_scales_in_place():
    h, w, th, tw = draw()
    for factor in (1.0, -2.5, 0.0):
        inputs = [h.clone().requires_grad_(), w.clone().requires_grad_()]
        got = torch.autograd.grad(ops.linear_kl_div(*inputs, th, tw, **CHUNK) * factor, inputs)
        plain, wanted = (gradients_of([*inputs, th, tw], factor, dtype) for dtype in (torch.float32, torch.float64))
        for a, b, exact in zip(got, plain, wanted, strict=True):
            assert_as_exact_as(a, b, exact, probability_error(h, w))


def test_inside_activation_checkpointing_the_op_is_saved():
    """With the op in the list of a selective checkpoint, the recomputation takes its results from the first run."""
    h, w, th, tw = draw()
    h.requires_grad_()
    calls = []
    from undo_kernels.library import backends

    original = backends._implementations["vocab_loss"]["cpu"]
    backends._implementations["vocab_loss"]["cpu"] = lambda p: (calls.append(p), original(p))[1]
    try:
        keep = functools.partial(create_selective_checkpoint_contexts, [torch.ops.undo.vocab_loss.default])
        block = lambda h: ops.linear_kl_div(torch.tanh(h), w, th, tw, **CHUNK)  # noqa: E731
        got = torch.autograd.grad(checkpoint(block, h, use_reentrant=False, context_fn=keep), h)
        assert len(calls) == 1
        wanted = torch.autograd.grad(block(h), h)
        assert torch.equal(got[0], wanted[0]), "the same computation"
    finally:
        backends._implementations["vocab_loss"]["cpu"] = original


def test_autocast_mixes_dtypes_without_a_copy_of_the_weight():
    h, w, th, tw = draw()
    hidden, weight = h.bfloat16().requires_grad_(), w.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ops.linear_kl_div(hidden, weight, th.bfloat16(), tw, **CHUNK)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    assert [g.dtype for g in gradients] == [torch.bfloat16, torch.float32] and loss.dtype == torch.float32
    exact = [hidden.detach().double().requires_grad_(), w.double().requires_grad_()]
    wanted = torch.autograd.grad(ops.linear_kl_div(*exact, th.bfloat16().double(), tw.double()), exact)
    for a, b in zip(gradients, wanted, strict=True):
        assert (a.double() - b).norm() < 0.01 * b.norm()  # the contract for 16 bits
