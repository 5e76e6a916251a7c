"""What the C++ losses hold and what they do with it: workspace, chunks, memory that is not theirs."""

import subprocess
import sys
import textwrap

import pytest
import torch
from bfloat16_ways import CONVERTED
from rounding import relative
from undo_kernels import cpu
from undo_kernels.cpu.plan import cpu_plan
from undo_kernels.problem import Problem
from undo_kernels.projection import Projection
from vocab_losses import VOCABULARY, divergence, draw, gradients, logits

from undo_core import ops

pytestmark = [
    pytest.mark.skipif(cpu.vocab_loss.kernels is None, reason="no C++ compiler was here when undo-core was installed"),
    pytest.mark.usefixtures("small_tiles"),
]


def test_sixteen_bit_weight_gradients_over_many_chunks(bfloat16):
    h, w, th, tw = draw(rows=400, width=32, teacher_width=32, dtype=torch.bfloat16)
    exact = [t.double().requires_grad_() for t in (h, w)]
    wanted = gradients(divergence(logits(*exact), logits(th, tw), "forward").mean(), exact)
    seen = set()
    for plan, workspace in (("chunk", None), ("chunk", 4_000_000), ("chunk", 1_200_000), ("recompute", 800_000)):
        inputs = [h.clone().requires_grad_(), w.clone().requires_grad_()]
        p = Problem(Projection(h, w), "forward", torch.ones(400), teacher=Projection(th, tw), needs=(True, True, False), plan=plan, workspace_bytes=workspace)  # fmt: skip
        chosen = cpu_plan(p, 400, bfloat16 != CONVERTED)
        seen.add((chosen.accumulator, -(-400 // chosen.tokens_per_chunk) > 1))
        got = gradients(ops.linear_kl_div(*inputs, th, tw, plan=plan, workspace_bytes=workspace), inputs)
        for a, b in zip(got, wanted, strict=True):
            assert a.dtype == torch.bfloat16 and relative(a, b) < 0.01  # the contract for 16 bits
    assert seen >= {(False, False), (False, True), (True, True)}


def product_that_reads_its_output(mm):
    """torch's own, for 16 bits, on some processors and for some shapes: what ``out`` held is multiplied by 0 and added."""

    def product(a, b, *, out=None):
        if out is None or out.dtype == torch.float32:
            return mm(a, b) if out is None else mm(a, b, out=out)
        return out.mul_(0).add_(mm(a, b))

    return product


@pytest.mark.parametrize("workspace", [None, 4_000_000, 1_200_000], ids=["one chunk", "chunks", "float32 sums"])
def test_spoilt_memory_does_not_show(bfloat16, workspace, monkeypatch):
    """Fresh memory may hold NaN."""
    monkeypatch.setattr(torch, "mm", product_that_reads_its_output(torch.mm))
    h, w, th, tw = draw(400, width=32, teacher_width=32, dtype=torch.bfloat16)
    inputs = [h.requires_grad_(), w.requires_grad_()]
    modes = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # with NaN
        found = gradients(ops.linear_kl_div(*inputs, th, tw, plan="chunk", workspace_bytes=workspace), inputs)
    finally:
        torch.use_deterministic_algorithms(modes[0])
        torch.utils.deterministic.fill_uninitialized_memory = modes[1]
    assert all(g.isfinite().all() for g in found)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_counted_is_zero(reduction, rows, dtype):
    spoilt = [torch.full((VOCABULARY, 32), torch.nan, dtype=dtype) for _ in range(4)]
    del spoilt  # memory that comes back with this in it must not show
    h, w, th, tw = draw(rows=rows, width=32, dtype=dtype)
    inputs = [h.requires_grad_(), w.requires_grad_()]
    mask = torch.zeros(rows, dtype=torch.bool)
    for plan in ("chunk", "recompute"):
        for loss in (
            ops.linear_kl_div(*inputs, th, tw, mask=mask, reduction=reduction, plan=plan),
            ops.linear_uniform_kl(*inputs, mask=mask, reduction=reduction, plan=plan),
            ops.linear_cross_entropy(*inputs, torch.full((rows,), -100), reduction=reduction, plan=plan),
        ):
            assert not loss.any() and not any(g.any() for g in gradients(loss.sum(), inputs))


@pytest.mark.parametrize("plan", ["chunk", "recompute"])
def test_two_calls_give_the_same_bits(plan):
    h, w, th, tw = draw(rows=300)
    results = []
    for _ in range(2):
        inputs = [h.clone().requires_grad_(), w.clone().requires_grad_()]
        loss = ops.linear_kl_div(*inputs, th, tw, plan=plan)
        results.append((loss.detach(), *gradients(loss, inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_memory_stays_within_the_workspace():
    """Peak resident memory beyond inputs and outputs, in a process of its own."""
    program = """
        import sys, torch
        from undo_core import ops
        torch.manual_seed(0)
        def peak():
            return {l.split()[0]: int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("Vm")}
        plan, workspace = sys.argv[1], int(sys.argv[2])
        def run(rows, vocabulary, workspace):
            h, w = torch.randn(rows, 32).requires_grad_(), torch.randn(vocabulary, 32).requires_grad_()
            th, tw = torch.randn(rows, 32), torch.randn(vocabulary, 32)
            open("/proc/self/clear_refs", "w").write("5")
            before = peak()["VmRSS:"]
            loss = ops.linear_kl_div(h, w, th, tw, plan=plan, workspace_bytes=workspace)
            after = peak()["VmHWM:"]
            return (after - before) * 1024 - 4 * 32 * (rows + vocabulary)
        run(64, 4096, 1 << 24)  # libraries allocate their own things once
        print(run(512, 128000, workspace))
    """
    for plan, workspace in (("chunk", 64 << 20), ("recompute", 12 << 20)):
        command = [sys.executable, "-c", textwrap.dedent(program), plan, str(workspace)]
        extra = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        assert extra < workspace + (4 << 20), f"{plan}: {extra / 2**20:.1f} MiB beyond outputs, workspace {workspace >> 20} MiB"


def test_a_workspace_that_cannot_do_is_refused_with_the_least_that_can():
    h, w, th, tw = draw()
    with pytest.raises(ValueError, match=r"^workspace_bytes: got 1000, wanted at least \d+"):
        ops.linear_kl_div(h, w, th, tw, workspace_bytes=1000)
    for plan in ("chunk", "recompute"):
        with pytest.raises(ValueError) as error:
            ops.linear_kl_div(h, w, th, tw, workspace_bytes=1000, plan=plan)
        least = int(str(error.value).split("at least ")[1].split()[0])
        assert ops.linear_kl_div(h, w, th, tw, workspace_bytes=least, plan=plan).isfinite()
