"""The Triton vocabulary losses, interpreted on CPU tensors, against formulas written out in float64."""

import dataclasses
import itertools
import math
import os

import pytest
import torch
from undo_kernels.problem import Problem
from undo_kernels.projection import GivenLogits, Projection
from undo_kernels.triton import costs, loss, recompute, rows, tuning
from undo_kernels.triton.products import Workspace

# The interpreter is numpy: it warns where a kernel meets the NaN and the infinities that a test feeds it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DENSE = ("forward", "reverse", "jsd")
TARGETS = ("own", "uniform", *DENSE)
SPARSE = ("bucket", "renormalize")


def test_runs_interpreted():
    assert os.environ.get("TRITON_INTERPRET") == "1", (
        "these tests need TRITON_INTERPRET=1 in the environment before pytest starts"
    )
    assert loss.INTERPRETED


# ---------------------------------------------------------------- the oracle: textbook formulas, autograd


def oracle_logits(side, hidden, weight, bias):
    z = hidden if isinstance(side, GivenLogits) else hidden @ weight.T
    if bias is not None:
        z = z + bias
    z = z * side.scale
    if side.softcap is not None:
        z = side.softcap * torch.tanh(z / side.softcap)
    return (z / side.temperature)[:, : side.vocabulary]


def oracle(p, dtype=torch.float64):
    """total, divergence, nll, lse_s, lse_t, gradients, entropy, agreement by autograd in ``dtype``; uncounted rows dropped."""
    counted = torch.ones(p.rows, dtype=torch.bool) if p.counted is None else p.counted
    leaf = {n: getattr(p.student, n) for n in ("hidden", "weight", "bias")}
    leaf = {n: None if t is None else t.detach().to(dtype).requires_grad_() for n, t in leaf.items()}
    hidden = torch.where(counted[:, None], leaf["hidden"], torch.zeros((), dtype=dtype))
    z = oracle_logits(p.student, hidden, leaf["weight"], leaf["bias"])
    log_s = torch.log_softmax(z, -1)
    lse_s = torch.logsumexp(z, -1)
    out = {"lse_s": lse_s}
    divergence = torch.zeros(p.rows, dtype=dtype)
    if p.target == "uniform":
        v = z.shape[1]
        divergence = (-math.log(v) - log_s).sum(-1) / v
    elif p.target in DENSE:
        t = p.teacher
        hidden_t = torch.where(counted[:, None], t.hidden.to(dtype), torch.zeros((), dtype=dtype))
        z_t = oracle_logits(t, hidden_t, t.weight.to(dtype), None if t.bias is None else t.bias.to(dtype))
        log_t = torch.log_softmax(z_t, -1)
        out["lse_t"] = torch.logsumexp(z_t, -1)
        out["entropy"] = -(log_t.exp() * log_t).sum(-1)
        out["agreement"] = (z.argmax(-1) == z_t.argmax(-1)).to(dtype)
        if p.target == "forward":
            divergence = (log_t.exp() * (log_t - log_s)).sum(-1)
        elif p.target == "reverse":
            divergence = (log_s.exp() * (log_s - log_t)).sum(-1)
        else:
            mixture = (p.beta * log_t.exp() + (1 - p.beta) * log_s.exp()).log()
            divergence = p.beta * (log_t.exp() * (log_t - mixture)).sum(-1)
            divergence = divergence + (1 - p.beta) * (log_s.exp() * (log_s - mixture)).sum(-1)
    elif p.target in SPARSE:
        divergence = torch.stack([_oracle_sparse(p, z, log_s, i) for i in range(p.rows)]) if p.rows else divergence
    nll = lse_s
    if p.labels is not None:
        at = p.labels.clamp(0, z.shape[1] - 1)
        nll = torch.where(p.labels < 0, lse_s, -log_s.gather(1, at[:, None])[:, 0])
    factor = torch.where(counted, p.factor.to(dtype), 0)
    total = (factor * divergence).sum() + 0 * z.sum()
    if p.label_factor is not None:
        total = total + (torch.where(counted, p.label_factor.to(dtype), 0) * nll).sum()
    wanted = [leaf[n] for n in ("hidden", "weight", "bias") if leaf[n] is not None]
    if isinstance(p.student, GivenLogits):
        wanted = [leaf["hidden"]]
    grads = torch.autograd.grad(total, wanted, allow_unused=True)
    grads = [torch.zeros_like(w) if g is None else g for g, w in zip(grads, wanted, strict=True)]
    out |= dict(zip(("d_hidden", "d_weight", "d_bias"), grads, strict=False))
    rows = {"divergence": divergence, "nll": nll, **{k: out[k] for k in ("lse_s", "lse_t", "entropy", "agreement") if k in out}}
    out |= {k: torch.where(counted, v, 0).detach() for k, v in rows.items()}
    return {"total": total.detach(), **out}


def _oracle_sparse(p, z, log_s, i):
    real = p.indices[i] >= 0
    index, log_t = p.indices[i][real], p.logprobs[i][real].to(z.dtype)
    if p.target == "renormalize":
        if not len(index):
            return z.sum() * 0
        log_t = log_t - torch.logsumexp(log_t, 0)
        chosen = z[i, index] - torch.logsumexp(z[i, index], 0)
        return (log_t.exp() * (log_t - chosen)).sum()
    value = (log_t.exp() * (log_t - log_s[i, index])).sum()
    rest = torch.ones(z.shape[1], dtype=torch.bool)
    rest[index] = False
    left = 1 - log_t.exp().sum()
    if rest.any() and left > 0:
        value = value + left * (left.log() - torch.logsumexp(log_s[i, rest], 0))
    return value


def same_dtype(p):
    """What plain torch gives in the inputs' dtypes with float32 logits: the yardstick of the errors."""
    return oracle(p, torch.float32)


# ---------------------------------------------------------------- problems


def problem(
    target="forward", rows=5, vocabulary=101, widths=(20, 12), dtype=torch.float32, teacher_dtype=None, seed=0, spread=2.0,
    bias=False, scale=1.0, softcap=None, temperature=1.0, padding=0, masked=None, labels=False, apart=None, k=4, given=False,
    needs=(True, True, True), factor="mixed", **options,
):  # fmt: skip
    """A problem with logits of standard deviation ``spread``; ``apart``: the student is the teacher plus this much noise."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    v = vocabulary + padding

    def side(width, kind):
        if given:
            hidden = (normal(rows, v) * spread).to(kind)
            return GivenLogits(hidden, hidden, temperature=temperature, vocab_size=vocabulary if padding else None)
        head = normal(v, width) * spread / math.sqrt(width)
        b = normal(v).to(kind) if bias else None
        return Projection(
            normal(rows, width).to(kind), head.to(kind), b, scale, softcap, temperature, vocabulary if padding else None
        )

    student = side(widths[0], dtype)
    teacher = side(widths[1], teacher_dtype or dtype) if target in DENSE else None
    if apart is not None:
        hidden, weight = student.hidden.float(), student.weight.float()
        teacher = dataclasses.replace(student)
        noisy = (hidden + apart * normal(*hidden.shape)).to(dtype)
        student = dataclasses.replace(
            student, hidden=noisy, weight=noisy if given else (weight + apart * weight.std() * normal(*weight.shape)).to(dtype)
        )
    factors = torch.rand(rows, generator=g) + 0.5 if factor == "mixed" else torch.full((rows,), float(factor))
    counted = None
    if masked is not None:
        counted = torch.rand(rows, generator=g) > masked
        for s in (student, teacher):
            if s is not None:
                s.hidden[~counted] = math.nan
    if target in SPARSE:
        indices = (
            torch.stack([torch.randperm(vocabulary, generator=g)[:k] for _ in range(rows)])
            if rows
            else torch.zeros(0, k).long()
        )
        indices[torch.rand(rows, k, generator=g) < 0.2] = -1
        share = torch.rand(rows, k, generator=g) + 0.1
        logprobs = (0.8 * share / share.sum(-1, keepdim=True)).log()
        options |= {"indices": indices, "logprobs": logprobs}
    if labels:
        label = torch.randint(0, vocabulary, (rows,), generator=g)
        label[torch.rand(rows, generator=g) < 0.25] = -1
        options |= {"labels": label, "label_factor": torch.rand(rows, generator=g) * (label >= 0)}
    elif target == "own":  # the log-sum-exp itself
        options.setdefault("label_factor", torch.rand(rows, generator=g))
    needs = (needs[0], needs[1] and not given, needs[2] and student.bias is not None)
    return Problem(student=student, target=target, factor=factors, counted=counted, teacher=teacher, needs=needs, **options)


def error(got, want):
    want = want.double()
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-30))


def check(p, **bounds):
    """Every output against the oracle; gradients to twice the error of plain torch, or 0.6 % of a 16-bit store, 2e-5 of a float32 one."""
    scratch = Workspace(torch.device("cpu"))
    hidden_before = p.student.hidden.clone() if not p.inplace else None
    want, yardstick = oracle(p), same_dtype(p)
    got = loss.run(p, scratch)
    if hidden_before is not None:
        assert torch.equal(hidden_before.nan_to_num(7.0), p.student.hidden.nan_to_num(7.0)), "inputs were written to"
    narrow = any(t.dtype != torch.float32 for t in (p.student.hidden, p.student.weight))
    for name in ("divergence", "nll", "lse_s", "lse_t"):
        value = getattr(got, name)
        if value.numel():
            torch.testing.assert_close(
                value.double(), want[name], atol=3e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
            )
    assert (got.divergence >= 0).all()
    torch.testing.assert_close(got.total.double(), want["total"], atol=5e-5, rtol=1e-4)
    if p.statistics and p.target in DENSE:
        torch.testing.assert_close(got.teacher_entropy.double(), want["entropy"], atol=3e-5, rtol=1e-4)
        assert torch.equal(got.top1_agreement.double(), want["agreement"])
    for number, name in enumerate(("d_hidden", "d_weight", "d_bias")):
        value = getattr(got, name)
        if not p.needs[number]:
            assert value.numel() == 0 or p.inplace
            continue
        bound = max(2 * error(yardstick[name], want[name]), 6e-3 if narrow else 2e-5)
        assert value.shape == want[name].shape
        assert torch.isfinite(value).all()
        assert error(value, want[name]) <= bounds.get("bound", bound), (name, error(value, want[name]), bound)
        if name != "d_hidden":
            assert (value[p.student.vocabulary :] == 0).all()
        elif p.counted is not None:
            assert (value[~p.counted] == 0).all()
    plan = loss.gpu_plan(p)
    assert scratch.peak <= plan.workspace_bytes
    if p.workspace_bytes is not None:
        assert scratch.peak <= p.workspace_bytes
    return got


# ---------------------------------------------------------------- every target with every option


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


def test_bfloat16_weight_over_many_chunks_is_summed_in_float32(monkeypatch):
    monkeypatch.setattr(costs, "_SUMMED_CHUNKS", 1)
    p = problem("forward", rows=33, dtype=torch.bfloat16, plan="chunk", workspace_bytes=40_000)
    plan = loss.gpu_plan(p)
    assert plan.accumulator
    assert plan.rows_per_chunk < 33
    check(p)


WAYS = [("own", "chunk"), ("own", "recompute"), ("jsd", "chunk"), ("jsd", "recompute"), ("bucket", "chunk")]


@pytest.mark.parametrize(("target", "plan"), WAYS)
@pytest.mark.parametrize("needs", [n for n in itertools.product((False, True), repeat=3) if sum(n) < 3])
def test_only_what_is_needed(needs, target, plan):
    check(problem(target, rows=3, vocabulary=37, needs=needs, bias=True, labels=True, plan=plan))


@pytest.mark.parametrize("plan", ["chunk", "recompute"])
@pytest.mark.parametrize("target", ["own", "uniform", *DENSE])
def test_known_log_sum_exps(target, plan):
    p = problem(target, labels=True, bias=True, plan=plan, softcap=8.0)
    first = loss.vocab_loss(dataclasses.replace(p, needs=(False,) * 3))
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
    assert loss.vocab_loss(too_many).total.isnan() or target == "own"


@pytest.mark.parametrize("target", [*TARGETS, *SPARSE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_given_logits(target, dtype):
    p = problem(target, given=True, dtype=dtype, padding=6, rows=6, masked=0.3, labels=True, temperature=1.4)
    got = check(p)
    again = dataclasses.replace(p, student=dataclasses.replace(p.student, hidden=p.student.hidden.clone()), inplace=True)
    result = loss.vocab_loss(again)
    assert result.d_hidden.data_ptr() == again.student.hidden.data_ptr()
    assert torch.equal(again.student.hidden, got.d_hidden)
    strided = torch.empty(p.student.hidden.shape[::-1], dtype=dtype).T.copy_(p.student.hidden)
    again = dataclasses.replace(p, student=dataclasses.replace(p.student, hidden=strided), inplace=True)
    loss.vocab_loss(again)
    assert torch.equal(strided, got.d_hidden)


@pytest.mark.parametrize("target", ["own", "forward", "jsd"])
def test_several_chunks_give_one_answer(target):
    p = problem(target, rows=21, vocabulary=211, labels=True, bias=True, padding=3)
    whole = loss.vocab_loss(dataclasses.replace(p, plan="chunk"))
    s = costs.Shapes(p, tuning.INTERPRETER)
    for plan, small in (("chunk", costs.chunk_plan(s, 8)), ("recompute", costs.recompute_plan(s, 2))):
        budget = small.workspace_bytes
        part = dataclasses.replace(p, plan=plan, workspace_bytes=budget)
        chosen = loss.gpu_plan(part)
        assert chosen.rows_per_chunk < 21 if plan == "chunk" else chosen.block_v < 211
        got = check(part)
        torch.testing.assert_close(got.d_weight, whole.d_weight, atol=1e-5, rtol=1e-4)


def test_workspace_too_small_names_the_least():
    p = problem("forward", workspace_bytes=100)
    with pytest.raises(ValueError, match=r"workspace_bytes: got 100, wanted at least \d+") as refusal:
        loss.vocab_loss(p)
    least = int(str(refusal.value).split("at least ")[1].split()[0])
    check(dataclasses.replace(p, workspace_bytes=least))


def test_unknown_plan_and_dtype_are_refused():
    with pytest.raises(ValueError, match="plan"):
        loss.vocab_loss(problem("forward", plan="fastest"))
    with pytest.raises(ValueError, match="recompute"):
        loss.vocab_loss(problem("bucket", plan="recompute"))
    with pytest.raises(TypeError, match="float64"):
        loss.vocab_loss(problem("own", dtype=torch.float64))


# ---------------------------------------------------------------- shapes


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


# ---------------------------------------------------------------- numerics


@pytest.mark.parametrize("plan", ["chunk", "recompute"])
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("target", DENSE)
def test_gradient_as_the_divergence_vanishes(target, softcap, plan):
    """Relative error of the gradients from a KL of about 1 to 1e-6, logits of standard deviation 3."""
    for dtype in (torch.bfloat16, torch.float32):
        reached = []
        for apart in (0.4, 0.1, 0.012, 0.0004) if dtype == torch.float32 else (0.4, 0.1, 0.01):
            # A 16-bit student cannot be moved by less than its spacing: the bias, in float32, moves it.
            p = problem(
                target,
                rows=4,
                vocabulary=251,
                widths=(24, 24),
                dtype=dtype,
                spread=3.0,
                softcap=softcap,
                apart=0.0,
                factor=1.0,
                plan=plan,
                bias=True,
                needs=(True, True, True),
            )
            g = torch.Generator().manual_seed(1)
            bias = p.student.bias.float() * 0 + apart * 3 * torch.randn(251, generator=g)
            p = dataclasses.replace(
                p,
                student=dataclasses.replace(p.student, bias=bias),
                teacher=dataclasses.replace(p.teacher, bias=torch.zeros(251)),
            )
            want, got = oracle(p), loss.vocab_loss(p)
            kl = float(want["divergence"].mean())
            reached.append(kl)
            worst = max(error(getattr(got, n), want[n]) for n in ("d_hidden", "d_weight"))
            bound = 0.01 if dtype == torch.bfloat16 else (1e-4 if kl > 1e-3 else 3e-3)
            assert worst < bound, (dtype, kl, worst)
            assert error(got.divergence, want["divergence"]) < 1e-3, (dtype, kl)
            assert (got.divergence >= 0).all()
        assert max(reached) > 0.1
        assert min(reached) < (1e-5 if dtype == torch.float32 else 1e-3)


def test_float16_gradient_does_not_underflow():
    for plan in ("chunk", "recompute"):
        p = problem("forward", rows=4, vocabulary=251, dtype=torch.float16, apart=0.0, factor=1e-7, plan=plan, bias=True)
        bias = 1e-3 * torch.randn(251, generator=torch.Generator().manual_seed(1))
        p = dataclasses.replace(
            p, student=dataclasses.replace(p.student, bias=bias), teacher=dataclasses.replace(p.teacher, bias=torch.zeros(251))
        )
        want, got = oracle(p), loss.vocab_loss(p)
        assert want["divergence"].max() < 1e-5
        assert error(got.d_weight, want["d_weight"]) < 0.01
        assert error(got.d_hidden, want["d_hidden"]) < 0.01


@pytest.mark.parametrize("plan", ["chunk", "recompute"])
@pytest.mark.parametrize("target", TARGETS)
def test_extreme_logits_stay_finite(target, plan):
    got = loss.vocab_loss(problem(target, spread=1e4, rows=4, labels=True, plan=plan))
    for value in got:
        assert torch.isfinite(value).all()


def test_extreme_logits_sparse():
    for target in SPARSE:
        got = loss.vocab_loss(problem(target, spread=1e4, rows=4, labels=True))
        assert all(torch.isfinite(value).all() for value in got)


def test_unrelated_student_and_teacher():
    """Log-sum-exps far apart: log1p(E_t[expm1(delta)]) would be noise here."""
    p = problem("forward", rows=4, spread=8.0, widths=(40, 12), bias=True)
    check(dataclasses.replace(p, teacher=dataclasses.replace(p.teacher, bias=p.teacher.bias + 60)))
    check(dataclasses.replace(p, student=dataclasses.replace(p.student, bias=p.student.bias + 300)))


def test_both_probabilities_underflow():
    z = torch.zeros(2, 64)
    z[:, 1:] = -200.0
    z[:, 5] = -300.0
    for target in DENSE:
        student, teacher = GivenLogits(z.clone(), z), GivenLogits(z * 1.5, z)
        got = loss.vocab_loss(
            Problem(student=student, target=target, factor=torch.ones(2), teacher=teacher, needs=(True, False, False))
        )
        assert torch.equal(got.divergence, torch.zeros(2))
        assert torch.equal(got.d_hidden, torch.zeros(2, 64))


@pytest.mark.parametrize("plan", ["chunk", "recompute"])
@pytest.mark.parametrize("target", [*TARGETS])
def test_nan_reaches_its_row_and_no_other(target, plan):
    p = problem(target, rows=4, labels=True, plan=plan, needs=(True, False, False))
    p.student.hidden[2, 3] = math.nan
    got = loss.vocab_loss(p)
    lost = got.nll if target == "own" else got.divergence
    assert lost.isnan().tolist() == [False, False, True, False]
    assert got.d_hidden.isnan().any(1).tolist() == [False, False, True, False]
    assert got.total.isnan()


def test_teachers_nan():
    for target, plan in itertools.product(DENSE, ("chunk", "recompute")):
        p = problem(target, rows=3, plan=plan)
        p.teacher.hidden[1] = math.nan
        assert loss.vocab_loss(p).divergence.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("plan", ["chunk", "recompute"])
def test_labels_outside_the_vocabulary(plan):
    p = problem("own", rows=3, padding=4, plan=plan, label_factor=torch.ones(3))
    p = dataclasses.replace(p, labels=torch.tensor([1, 102, -5]))
    got = loss.vocab_loss(p)
    assert got.nll.isnan().tolist() == [False, True, False]
    assert got.nll[2] == got.lse_s[2]


def test_label_gradient_without_cancellation():
    """p - 1 of a label that is almost certain."""
    z = torch.zeros(1, 70)
    z[0, 3] = 12.0
    side = GivenLogits(z, z)
    p = Problem(side, "own", torch.zeros(1), torch.ones(1), torch.tensor([3]), needs=(True, False, False))
    got, want = loss.vocab_loss(p), oracle(p)
    assert abs(got.d_hidden[0, 3] / want["d_hidden"][0, 3] - 1) < 2e-3  # float32 sums: 1 + 4e-4
    assert abs(got.nll[0] / want["nll"][0] - 1) < 2e-3


@pytest.mark.parametrize("beta", [1e-6, 0.02, 0.98, 1 - 1e-6])
@pytest.mark.parametrize("spread", [0.1, 5.0])
def test_jsd_near_its_end_points(beta, spread):
    p = problem("jsd", rows=3, beta=beta, spread=spread, factor=1.0)
    want, got = oracle(p), loss.vocab_loss(p)
    assert error(got.divergence, want["divergence"]) < 1e-5
    assert error(got.d_hidden, want["d_hidden"]) < 1e-4


@pytest.mark.parametrize("target", DENSE)
@pytest.mark.parametrize(("spread", "near"), [(10, 0.1), (10, 1e-5), (30, 1e-3)])
def test_peaked_teachers_that_the_student_agrees_with(target, spread, near):
    """The gap of the log-sum-exps is not the difference of two float32 sums; 300 columns are two blocks in two parts."""
    g = torch.Generator().manual_seed(2)
    z_s = torch.randn(4, 300, generator=g) * spread
    z_t = z_s + torch.randn(4, 300, generator=g) * near
    teacher = GivenLogits(z_t, z_t)
    got = loss.vocab_loss(Problem(GivenLogits(z_s, z_s), target, torch.ones(4), teacher=teacher, needs=(True, False, False)))
    s, t = z_s.double().log_softmax(-1), z_t.double().log_softmax(-1)
    x = s - t
    if target == "forward":
        want = t.exp() * x.expm1()
    else:
        half = torch.logaddexp(s, t) - math.log(2)
        x = x if target == "reverse" else 0.5 * (s - half)
        want = s.exp() * (x - (s.exp() * x).sum(-1, keepdim=True))
    assert error(got.d_hidden, want) < 1e-4


@pytest.mark.parametrize("plan", ["chunk", "recompute"])
@pytest.mark.parametrize("target", DENSE)
def test_a_student_that_is_its_teacher_gets_no_gradient(target, plan):
    p = problem(target, plan=plan, spread=3.0, softcap=7.0)
    p = dataclasses.replace(p, teacher=p.student)
    first = loss.vocab_loss(p)
    for got in (first, loss.vocab_loss(dataclasses.replace(p, lse_s=first.lse_s, lse_t=first.lse_t))):
        assert not any(t.any() for t in (got.divergence, got.d_hidden, got.d_weight))


# ---------------------------------------------------------------- sparse teachers


def test_sparse_teacher_that_leaves_nothing():
    p = problem("bucket", rows=3, k=3)
    logprobs = torch.log_softmax(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double(), -1).float()
    p = dataclasses.replace(p, indices=torch.tensor([[0, 5, 9], [3, 2, 1], [7, 8, 100]]), logprobs=logprobs)
    got = loss.vocab_loss(p)
    z = oracle_logits(p.student, p.student.hidden.double(), p.student.weight.double(), None)
    log_s = torch.log_softmax(z, -1).gather(1, p.indices)
    want = (logprobs.double().exp() * (logprobs.double() - log_s)).sum(-1)
    torch.testing.assert_close(got.divergence.double(), want, atol=1e-5, rtol=1e-5)


def test_sparse_teachers_at_their_edges():
    """The rest's probability underflows, a known one is 0, nothing is known."""
    z = torch.zeros(3, 150)
    z[:, 0] = torch.tensor([60.0, 104.0, 300.0])
    known = {"indices": torch.tensor([[0, 7]] * 3), "logprobs": torch.tensor([[math.log(0.5), -math.inf]] * 3)}
    nothing = {"indices": torch.zeros(3, 0, dtype=torch.int64), "logprobs": torch.zeros(3, 0)}
    for target in SPARSE:
        got = loss.vocab_loss(Problem(GivenLogits(z, z), target, torch.ones(3), needs=(True, False, False), **known))
        assert got.divergence.isfinite().all()
        assert got.d_hidden.isfinite().all()
        if target == "bucket":
            torch.testing.assert_close(got.d_hidden[:, 0], torch.full((3,), 0.5), rtol=1e-5, atol=0)
        assert loss.vocab_loss(Problem(GivenLogits(z, z), target, torch.ones(3), **nothing)).total == 0


def test_sparse_teacher_that_knows_everything_or_nothing():
    for target in SPARSE:
        p = problem(target, rows=2, vocabulary=8, k=8, labels=True)
        logprobs = torch.log_softmax(torch.randn(2, 8, generator=torch.Generator().manual_seed(0)), -1)
        check(dataclasses.replace(p, indices=torch.arange(8).expand(2, 8).contiguous(), logprobs=logprobs))
        check(dataclasses.replace(p, indices=torch.full((2, 8), -1), logprobs=logprobs))


@pytest.mark.parametrize("target", SPARSE)
def test_sparse_gradient_as_the_divergence_vanishes(target):
    for apart in (1.0, 1e-2, 1e-3):
        p = problem(target, rows=3, vocabulary=200, k=20, given=True, needs=(True, False, False))
        log_s = torch.log_softmax(p.student.hidden.double(), -1)
        noise = torch.randn(p.student.hidden.shape, generator=torch.Generator().manual_seed(2))
        indices = torch.stack([torch.randperm(200, generator=torch.Generator().manual_seed(i))[:20] for i in range(3)])
        logprobs = torch.log_softmax(log_s + apart * noise, -1).gather(1, indices)  # float64, as a caller may have it
        p = dataclasses.replace(p, indices=indices, logprobs=logprobs, factor=torch.ones(3))
        want, got = oracle(p), loss.vocab_loss(p)
        assert error(got.d_hidden, want["d_hidden"]) < (1e-4 if apart > 0.1 else 3e-3)
        assert error(got.divergence, want["divergence"]) < 1e-3


# ---------------------------------------------------------------- filter, determinism, plans


@pytest.mark.parametrize("plan", ["chunk", "recompute"])
@pytest.mark.parametrize("target", ["own", "forward"])
def test_filter_reports_what_it_drops(target, plan):
    p = problem(target, rows=20, vocabulary=300, widths=(6, 6), needs=(True, True, False), plan=plan, masked=0.2)
    p = dataclasses.replace(p, label_factor=torch.ones(20)) if target == "own" else p
    full = loss.vocab_loss(p)
    nothing = loss.vocab_loss(dataclasses.replace(p, filter_below=1e-30))
    assert nothing.filtered.tolist() == [0.0, 0.0]
    assert torch.equal(nothing.d_weight, full.d_weight)
    everything = loss.vocab_loss(dataclasses.replace(p, filter_below=1e9))
    assert everything.filtered[0] == pytest.approx(1.0)
    assert not everything.d_weight.any()
    z = oracle_logits(p.student, p.student.hidden.double().nan_to_num(), p.student.weight.double(), None)[p.counted]
    slope = torch.softmax(z, -1)
    if target == "forward":
        slope = slope - torch.softmax(
            oracle_logits(p.teacher, p.teacher.hidden.double().nan_to_num(), p.teacher.weight.double(), None)[p.counted], -1
        )
        slope = slope * p.factor[p.counted, None]
    assert everything.filtered[1] == pytest.approx(float(slope.norm()), rel=1e-3)
    some = loss.vocab_loss(dataclasses.replace(p, filter_below=float(slope.abs().quantile(0.999))))
    assert 0 < some.filtered[0] < 1
    head = p.student.weight.double().norm()
    assert (some.d_hidden.double() - full.d_hidden.double()).norm() <= some.filtered[1] * head * (1 + 1e-4)
    torch.testing.assert_close(some.total, full.total)


def test_filter_keeps_labels():
    for plan in ("chunk", "recompute"):
        p = problem("own", rows=3, vocabulary=64, labels=True, plan=plan, filter_below=1e9)
        got = loss.vocab_loss(p)
        assert got.d_hidden[p.labels >= 0].any(1).all()


@pytest.mark.parametrize("plan", ["chunk", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_calls_give_the_same_bits(plan, dtype):
    p = problem("jsd", rows=18, dtype=dtype, plan=plan, labels=True, bias=True, masked=0.3, max_counted=16)
    for a, b in zip(loss.vocab_loss(p), loss.vocab_loss(p), strict=True):
        assert torch.equal(a, b)


def shaped(width, known=False, target="forward", rows=8192, vocabulary=256_000, dtype=torch.bfloat16, **options):
    """A problem of full size on the meta device."""

    def new(*shape):
        return torch.empty(*shape, dtype=dtype, device="meta")

    row = torch.empty(rows, device="meta")
    student, teacher = (Projection(new(rows, width), new(vocabulary, width)) for _ in range(2))
    teacher = teacher if target in DENSE else None
    options = {"needs": (True, True, False), **options}
    return Problem(student, target, row, teacher=teacher, lse_t=row if known else None, **options)


def test_the_width_decides_the_plan(monkeypatch):
    assert costs.gpu_plan(shaped(320), "sm_90").name == "recompute"
    assert costs.gpu_plan(shaped(2304), "sm_90").name == "chunk"
    widths = range(64, 4096, 64)
    slow, known = (next(w for w in widths if costs.gpu_plan(shaped(w, k), "sm_90").name == "chunk") for k in (False, True))
    assert known > slow  # the teacher's log-sum-exps save the recompute plan a product
    monkeypatch.setattr(costs, "TILES_16", costs.MATRIX_16)
    fast = next(w for w in widths if costs.gpu_plan(shaped(w), "sm_90").name == "chunk")
    assert 1100 < fast < 1700  # 1100 from the logits' bytes alone; chunks read heads and weight gradient again
    assert costs.gpu_plan(shaped(2205, known=True), "sm_90").name == "recompute"


def test_plans_count_products_and_bytes():
    s = costs.Shapes(shaped(2304), "sm_90")
    pairs, width = 8192 * 256_000, 2304
    chunk, recomputed = costs._chunk_plans(s, None)[0], costs._recompute_plans(s, None)[0]
    assert chunk.flops == 4 * 2 * pairs * width
    assert recomputed.flops == 6 * 2 * pairs * width
    assert chunk.rows_per_chunk >= 1024
    assert not chunk.accumulator
    assert chunk.workspace_bytes < 2.8e9
    assert recomputed.workspace_bytes < 5e8
    known = costs.Shapes(shaped(2304, known=True), "sm_90")
    assert costs._recompute_plans(known, None)[0].flops == 5 * 2 * pairs * width


def test_a_bound_on_the_workspace_holds_in_every_plan():
    for width, budget in ((320, 1 << 28), (2304, 1 << 30), (2304, 3 << 28)):
        plan = costs.gpu_plan(shaped(width, workspace_bytes=budget), "sm_90")
        assert plan.workspace_bytes <= budget


class _NoKernel:
    """Stands in for a kernel where no device is."""

    def __getitem__(self, grid):
        assert all(n > 0 for n in grid)
        assert all(n <= 65535 for n in grid[1:])
        return lambda *args, **kwargs: None


@pytest.mark.parametrize("plan", ["chunk", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_drivers_never_wait_for_a_gpu(monkeypatch, dtype, plan):
    """On meta tensors, which have no values to look at: any synchronisation raises, and so do dtypes that torch refuses."""
    for module, names in (
        (rows, ("stats_rows", "combine_rows", "loss_rows", "pick_rows", "put_rows")),
        (recompute, ("stats_tiles", "loss_tiles", "pick_labels")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, _NoKernel())
    monkeypatch.setattr(tuning, "target_of", lambda device: "sm_90")
    for target, given in itertools.product((*TARGETS, *SPARSE), (False, True)):
        if plan == "recompute" and (target in SPARSE or given):
            continue
        with torch.device("meta"):
            n, v, d = 300, 1000, 64

            def new(*shape, dtype=dtype):
                return torch.empty(*shape, dtype=dtype)

            def side(new=new, given=given, n=n, v=v, d=d):
                hidden = new(n, v if given else d)
                return (
                    GivenLogits(hidden, hidden)
                    if given
                    else Projection(hidden, new(v, d), new(v), softcap=30.0, vocab_size=v - 3)
                )

            row = torch.empty(n)
            p = Problem(
                side(), target, row, row, torch.empty(n, dtype=torch.int64), torch.empty(n, dtype=torch.bool),
                side() if target in DENSE else None, torch.empty(n, 7, dtype=torch.int64), torch.empty(n, 7),
                needs=(True, not given, not given), plan=plan, statistics=True, filter_below=1e-6, max_counted=250,
            )  # fmt: skip
            for part in (p, dataclasses.replace(p, max_counted=None, workspace_bytes=4_000_000, filter_below=0.0)):
                got = loss.run(part, Workspace(torch.device("meta")))
                assert all(t.device.type == "meta" for t in got)
                assert got.d_hidden.shape == p.student.hidden.shape
                assert got.d_hidden.dtype == (torch.float32 if dtype == torch.float16 else dtype)


def test_describe():
    plan = costs.describe("linear_kl_div", shaped(640))
    assert plan.seconds > 0
    assert plan.name in str(plan)


def test_every_tile_of_the_table_is_a_power_of_two():
    for target, kernel, wide in itertools.product(tuning.TARGETS, tuning.KERNELS, (False, True)):
        tile = tuning.tile(target, kernel, wide)
        assert all(n & (n - 1) == 0 for n in (tile.block_t, tile.block_v, tile.block_d, tile.warps, tile.pieces))
