"""Every op of the C++ backend, again and again while other threads run the others: the same bits each time."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import undo_kernels
from random_draws import bits
from undo_kernels import cpu, ops
from vocab_losses import draw

pytestmark = pytest.mark.skipif(cpu.vocab_loss.kernels is None, reason="no C++ compiler was here when undo-core was installed")
THREADS = 4
TOKENS, ENTRIES = 33, 1021


def calls():
    """Returns functions of nothing by the op that they call; each returns tensors that its kernels made."""
    h, w, th, tw = draw(TOKENS, ENTRIES, 32, 17)
    near = (h + 1e-3).bfloat16(), w.bfloat16()
    labels = torch.arange(TOKENS) * 7
    known = torch.arange(4).expand(TOKENS, 4), torch.full((TOKENS, 4), -2.0)
    mask = torch.arange(TOKENS) % 3 != 0

    def differentiated(function, *tensors, **options):
        def call():
            leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
            loss = function(*leaves, **options)
            return loss.detach(), *torch.autograd.grad(loss.sum(), leaves)

        return call

    def noised():
        tensors = {"a": w.clone(), "b": near[1].clone()}
        ops.noise_(tensors, alpha=0.3, beta=0.1, seed=5)
        return tuple(tensors.values())

    def teacher(kind, th, tw, plan, **options):
        return lambda h, w: ops.linear_kl_div(h, w, th, tw, divergence=kind, plan=plan, **options)

    return {
        "forward KL": differentiated(teacher("forward", th, tw, "chunk", mask=mask), h, w),
        "reverse KL": differentiated(teacher("reverse", th, tw, "recompute", reduction="none"), h, w),
        "JSD in bfloat16": differentiated(teacher("jsd", *near, "chunk", student_softcap=5.0), h.bfloat16(), w.bfloat16()),
        "KL of logits": differentiated(
            lambda z: ops.kl_div(z, th @ tw.T, plan="chunk", labels=labels, label_weight=0.5), h @ w.T
        ),
        "cross-entropy": differentiated(lambda h, w: ops.linear_cross_entropy(h, w, labels, plan="recompute"), h, w),
        "log-sum-exp": differentiated(lambda h, w: ops.linear_lse(h, w, plan="chunk"), h, w),
        "uniform KL": differentiated(lambda h, w: ops.linear_uniform_kl(h, w, plan="chunk"), h, w),
        "sparse KL": differentiated(lambda h, w: ops.linear_sparse_kl_div(h, w, *known, plan="chunk"), h, w),
        "RMU": differentiated(lambda h: ops.rmu_loss(h, th[:, :1].mean(0).expand(32), mask=mask, normalize="masked"), h),
        "noise": noised,
        "replay": lambda: (ops.replay("w", (64, 65), seed=3, law="xavier_normal"),),
        "direction": lambda: (ops.misdirection(64, 1),),
    }


def test_the_bits_are_the_same_while_other_threads_run_other_ops(tries, account):
    count, made = tries(20, 1000), calls()

    def run(name):
        with undo_kernels.backend("cpu"):
            return [bits(tensor) for tensor in made[name]()]

    first = {name: run(name) for name in made}

    def repeat(name):
        for number in range(count):
            for got, want in zip(run(name), first[name], strict=True):
                assert torch.equal(got, want), f"{name}: other bits at repetition {number}"

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(repeat, made))
    account("repetitions of an op beside others", tried=count * len(made), survived=count * len(made))
