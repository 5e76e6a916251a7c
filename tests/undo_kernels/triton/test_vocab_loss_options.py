"""The Triton losses, on a GPU or interpreted, against formulas written out in float64: every target with every option."""

import dataclasses
import itertools
import math
import os

import pytest
import torch
from triton_problems import DENSE, DEVICE, SPARSE, TARGETS, check, moved, problem, vocab_loss
from undo_kernels.triton import vocab_loss as driver

# The interpreter is numpy: it warns where a kernel meets the NaN and the infinities that a test feeds it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def test_runs_on_the_gpu_or_interpreted():
    assert (os.environ.get("TRITON_INTERPRET") == "1") == driver.INTERPRETED
    assert torch.cuda.is_available() != driver.INTERPRETED, "set TRITON_INTERPRET=1 before pytest starts, where there is no GPU"


OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 5.0, "scale": 1.3, "temperature": 1.5},
    "bias": {"bias": True, "temperature": 0.7},
    "padded": {"padding": 11, "bias": True},
    "masked": {"masked": 0.4, "rows": 9, "softcap": 6.0, "bias": True},
    "labels": {"labels": True, "softcap": 5.0},
    "statistics": {"statistics": True},
    "everything": {
        "softcap": 5.0, "scale": 0.8, "temperature": 1.2, "bias": True, "padding": 5, "masked": 0.3, "labels": True, "rows": 19,
    },
}  # fmt: skip


@pytest.mark.parametrize("plan", ["chunk", "recompute"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("target", TARGETS)
def test_options(target, option, plan):
    check(problem(target, plan=plan, seed=hash_of(target, option), **OPTIONS[option]))


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("target", SPARSE)
def test_options_sparse(target, option):
    check(problem(target, seed=hash_of(target, option), **OPTIONS[option]))


def hash_of(*names):
    return sum(ord(c) * (i + 1) for i, c in enumerate("".join(names))) % 1000


@pytest.mark.parametrize("plan", ["chunk", "recompute"])
@pytest.mark.parametrize(
    ("dtype", "teacher_dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("target", ["forward", "reverse", "jsd"])
def test_dtypes(target, dtype, teacher_dtype, plan):
    got = check(
        problem(
            target,
            dtype=dtype,
            teacher_dtype=teacher_dtype,
            plan=plan,
            bias=True,
            factor=1e-4 if dtype == torch.float16 else 1.0,
        )
    )
    wanted = torch.float32 if dtype == torch.float16 else dtype
    assert got.d_hidden.dtype == got.d_weight.dtype == got.d_bias.dtype == wanted


@pytest.mark.parametrize("plan", ["chunk", "recompute"])
@pytest.mark.parametrize(("hidden", "weight"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_hidden_and_weight_of_two_dtypes(hidden, weight, plan):
    p = problem("forward", plan=plan, masked=0.2, rows=8)
    side = dataclasses.replace(p.student, hidden=p.student.hidden.to(hidden), weight=p.student.weight.to(weight))
    got = check(dataclasses.replace(p, student=side))
    assert (got.d_hidden.dtype, got.d_weight.dtype) == (hidden, weight)


WAYS = [("own", "chunk"), ("own", "recompute"), ("jsd", "chunk"), ("jsd", "recompute"), ("bucket", "chunk")]


@pytest.mark.parametrize(("target", "plan"), WAYS)
@pytest.mark.parametrize("needs", [n for n in itertools.product((False, True), repeat=3) if sum(n) < 3])
def test_only_what_is_needed(needs, target, plan):
    check(problem(target, rows=3, vocabulary=37, needs=needs, bias=True, labels=True, plan=plan))


@pytest.mark.parametrize("plan", ["chunk", "recompute"])
@pytest.mark.parametrize("target", ["own", "uniform", *DENSE])
def test_known_log_sum_exps(target, plan):
    p = problem(target, labels=True, bias=True, plan=plan, softcap=8.0)
    first = vocab_loss(dataclasses.replace(p, needs=(False,) * 3))
    lse_t = first.lse_t if target in DENSE else None
    for known in ({"lse_s": first.lse_s, "lse_t": lse_t}, {"lse_t": lse_t}, {"lse_s": first.lse_s}):
        check(dataclasses.replace(p, **known))


@pytest.mark.parametrize("plan", ["chunk", "recompute"])
@pytest.mark.parametrize("target", ["own", "jsd", "bucket"])
@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows, target, plan):
    plan = "chunk" if target == "bucket" else plan
    got = check(problem(target, rows=rows, labels=True, bias=True, plan=plan))
    if rows == 0:
        assert got.total == 0
        assert not got.d_weight.any()


@pytest.mark.parametrize("plan", ["chunk", "recompute"])
@pytest.mark.parametrize("bound", [None, 2, 0])
def test_no_row_counts(plan, bound):
    got = check(problem("forward", rows=6, masked=1.1, bias=True, labels=True, plan=plan, max_counted=bound))
    assert got.total == 0
    assert not any(g.any() for g in (got.d_hidden, got.d_weight, got.d_bias, got.divergence, got.lse_s))


@pytest.mark.parametrize("plan", ["chunk", "recompute"])
@pytest.mark.parametrize("target", ["own", "reverse", "jsd", "renormalize"])
def test_compacted_rows(target, plan):
    plan = "chunk" if target == "renormalize" else plan
    p = problem(target, rows=14, masked=0.6, labels=True, bias=True, plan=plan, statistics=target == "jsd")
    count = int(p.counted.sum())
    assert 0 < count < 12
    for bound in (count, count + 2):
        check(dataclasses.replace(p, max_counted=bound))
    too_many = dataclasses.replace(p, max_counted=count - 1, factor=torch.full_like(p.factor, math.nan))
    assert vocab_loss(too_many).total.isnan() or target == "own"


@pytest.mark.parametrize("target", [*TARGETS, *SPARSE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_given_logits(target, dtype):
    p = problem(target, given=True, dtype=dtype, padding=6, rows=6, masked=0.3, labels=True, temperature=1.4)
    got = check(p)
    there = moved(p)
    again = dataclasses.replace(
        there, student=dataclasses.replace(there.student, hidden=there.student.hidden.clone()), inplace=True
    )
    result = driver.vocab_loss(again)
    assert result.d_hidden.data_ptr() == again.student.hidden.data_ptr()
    assert torch.equal(again.student.hidden.cpu(), got.d_hidden)
    strided = torch.empty(p.student.hidden.shape[::-1], dtype=dtype, device=DEVICE).T.copy_(p.student.hidden)
    again = dataclasses.replace(there, student=dataclasses.replace(there.student, hidden=strided), inplace=True)
    driver.vocab_loss(again)
    assert torch.equal(strided.cpu(), got.d_hidden)


@pytest.mark.parametrize("plan", ["chunk", "recompute"])
@pytest.mark.parametrize("vocabulary", [1, 2, 31, 32, 33, 97])
def test_vocabularies(vocabulary, plan):
    check(problem("forward", rows=2, vocabulary=vocabulary, labels=True, plan=plan))


@pytest.mark.parametrize("plan", ["chunk", "recompute"])
@pytest.mark.parametrize("widths", [(1, 3), (16, 48), (33, 17)])
def test_widths(widths, plan):
    check(problem("jsd", rows=18, vocabulary=67, widths=widths, plan=plan))


def test_a_large_vocabulary_in_parts():
    check(problem("forward", rows=3, vocabulary=256_000, widths=(8, 4), plan="chunk", labels=True, statistics=True))


@pytest.mark.parametrize("plan", ["chunk", "recompute"])
def test_strided_inputs(plan):
    p = problem("forward", bias=True, plan=plan)

    def twisted(t):
        return torch.empty(t.shape[::-1], dtype=t.dtype).T.copy_(t)

    def twist(side):
        return dataclasses.replace(
            side, hidden=twisted(side.hidden), weight=twisted(side.weight), bias=side.bias.repeat_interleave(2)[::2]
        )

    check(dataclasses.replace(p, student=twist(p.student), teacher=twist(p.teacher)))


@pytest.mark.parametrize("plan", ["chunk", "recompute"])
def test_labels_outside_the_vocabulary(plan):
    p = problem("own", rows=3, padding=4, plan=plan, label_factor=torch.ones(3))
    p = dataclasses.replace(p, labels=torch.tensor([1, 102, -5]))
    got = vocab_loss(p)
    assert got.nll.isnan().tolist() == [False, True, False]
    assert got.nll[2] == got.lse_s[2]


def test_sparse_teacher_that_knows_everything_or_nothing():
    for target in SPARSE:
        p = problem(target, rows=2, vocabulary=8, k=8, labels=True)
        logprobs = torch.log_softmax(torch.randn(2, 8, generator=torch.Generator().manual_seed(0)), -1)
        check(dataclasses.replace(p, indices=torch.arange(8).expand(2, 8).contiguous(), logprobs=logprobs))
        check(dataclasses.replace(p, indices=torch.full((2, 8), -1), logprobs=logprobs))
