"""Infinite and NaN logits: every backend gives the limits of the formulas, element by element, values and gradients.

The oracle writes the definitions out in float64, with the conventions that the docstring of ``reference/divergence.py`` states.
"""

import math

import pytest
import torch
import undo_kernels
from rounding import EXPONENTIAL, assert_as_exact_as, gamma, relative
from undo_kernels.triton import vocab_loss as triton_loss

from undo_core import ops

VOCABULARY = 300  # three of the C++ kernels' blocks
TRITON = torch.device("cpu" if triton_loss.INTERPRETED else "cuda")
INF, NAN = math.inf, math.nan
ONE, OTHER, BLOCK, ALL = slice(5, 6), slice(6, 7), slice(0, 150), slice(None)  # ONE is a known entry of the sparse teacher
ROWS = {  # what the student's and the teacher's logits are overwritten with, and where
    "finite": [],
    "suppressed on both sides": [("s", ONE, -INF), ("t", ONE, -INF)],
    "suppressed in the student": [("s", ONE, -INF)],
    "suppressed in the teacher": [("t", ONE, -INF)],
    "half on both sides": [("s", BLOCK, -INF), ("t", BLOCK, -INF)],
    "half of the student": [("s", BLOCK, -INF)],
    "half of the teacher": [("t", BLOCK, -INF)],
    "no overlap": [("s", BLOCK, -INF), ("t", slice(150, None), -INF)],
    "infinite student": [("s", ONE, INF)],
    "infinite teacher": [("t", ONE, INF)],
    "NaN student": [("s", ONE, NAN)],
    "NaN teacher": [("t", ONE, NAN)],
    "infinite student beside the known entries": [("s", OTHER, INF)],
    "NaN student beside the known entries": [("s", OTHER, NAN)],
    "NaN student, suppressed in the teacher": [("s", ONE, NAN), ("t", ONE, -INF)],
    "NaN teacher, suppressed in the student": [("t", ONE, NAN), ("s", ONE, -INF)],
    "nothing but -inf in the student": [("s", ALL, -INF)],
    "nothing but -inf in the teacher": [("t", ALL, -INF)],
}
BACKENDS = ["float64", "reference", *(f"cpu {name}" for name in undo_kernels.cpu.vector_units()), "triton"]


@pytest.fixture(params=BACKENDS)
def run(request, monkeypatch):
    """Runs an op on one backend, of which it asserts that it ran: ``run(op, tensors, plan=...)`` gives loss and gradients."""
    backend, _, form = request.param.partition(" ")
    monkeypatch.setenv("UNDO_CPU_ISA", form)
    device = TRITON if backend == "triton" else torch.device("cpu")
    fused = backend in ("cpu", "triton")

    def run(op, student, others=(), plan="chunk", **options):
        def moved(t):
            t = t.to(device)
            return t.double() if backend == "float64" and t.is_floating_point() else t

        student = [moved(t).requires_grad_() for t in student]
        options = {k: moved(v) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        names = {k: student[v] for k, v in options.items() if isinstance(v, int) and k == "bias"}
        with undo_kernels.backend(backend if fused else "reference"), undo_kernels.recorded() as calls:
            arguments = [*student[: len(student) - len(names)], *map(moved, others)]
            loss = op(*arguments, **options | names, reduction="none", plan=plan if fused else "direct")
            gradients = torch.autograd.grad(loss.sum(), student)
        assert {c.backend for c in calls} == {backend if fused else "reference"}
        assert not form or {c.form for c in calls} == {form}
        return [t.detach().cpu() for t in (loss, *gradients)]

    return run


def logits():
    generator = torch.Generator().manual_seed(0)
    z = {side: 2 * torch.randn(len(ROWS), VOCABULARY, generator=generator) for side in "st"}
    for i, changes in enumerate(ROWS.values()):
        for side, where, value in changes:
            z[side][i, where] = value
    return z["s"], z["t"]


def times(p, x):
    """``p * x`` with ``0 * inf = 0``."""
    return torch.where(p == 0, p, p * x)


def oracle(target, z_s, z_t, beta=0.3):
    """Divergence of each row, and its gradient by the student's logits."""
    log_s, log_t = z_s.log_softmax(-1), z_t.log_softmax(-1)
    s, t = log_s.exp(), log_t.exp()
    if target in ("forward", "uniform"):
        return times(t, log_t - log_s).sum(-1), s - t
    if target == "reverse":
        ratio = torch.where(s == 0, 0.0, log_s - log_t)
        kl = times(s, log_s - log_t).sum(-1, keepdim=True)
        return kl[:, 0], torch.where(kl == INF, NAN, s * (ratio - kl))
    log_m = (beta * t + (1 - beta) * s).log()
    from_s = times(s, log_s - log_m).sum(-1, keepdim=True)
    value = beta * times(t, log_t - log_m).sum(-1) + (1 - beta) * from_s[:, 0]
    return value, (1 - beta) * s * (torch.where(s == 0, 0.0, log_s - log_m) - from_s)


def check(got, target, z_s, z_t, *options):
    want, narrow = oracle(target, z_s.double(), z_t.double(), *options), oracle(target, z_s, z_t, *options)
    compare(got, narrow, want)


def compare(got, narrow, want):
    for name, ours, theirs, exact in zip(("loss", "gradient"), got, narrow, want, strict=True):
        floor = gamma(VOCABULARY + EXPONENTIAL + 20)  # the sums' terms, and logits of up to 20 under an exponential
        for row, case in enumerate(ROWS):
            assert_as_exact_as(ours[row, None], theirs[row, None], exact[row, None], floor, f"{name}, {case}", scale=1.0)


@pytest.mark.parametrize("target", ["forward", "reverse", "jsd"])
def test_given_logits(run, target):
    z_s, z_t = logits()
    options = {"beta": 0.3} if target == "jsd" else {}
    check(run(ops.kl_div, [z_s], [z_t], divergence=target, **options), target, z_s, z_t)


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_known_entries(run, tail):
    z_s, z_t = logits()
    z_t = torch.where(z_t.isfinite() | (z_t == -INF), z_t, 0.0)  # a teacher that is no distribution is refused
    z_t[-1] = 0.0
    indices = torch.tensor([5, 7, 160, -1, 299]).repeat(len(ROWS), 1)
    logprobs = z_t.log_softmax(-1).gather(-1, indices.clamp_min(0))
    got = run(ops.sparse_kl_div, [z_s], [indices, logprobs], tail=tail)
    results = [sparse_oracle(z.to(d), indices, logprobs.to(d), tail) for z, d in ((z_s, torch.float32), (z_s, torch.float64))]
    compare(got, *results)


def sparse_oracle(z, indices, logprobs, tail):
    known = [5, 7, 160, 299]
    rest = [v for v in range(VOCABULARY) if v not in known]
    log_t = logprobs[:, indices[0] >= 0]
    if tail == "renormalize":
        value, gradient = oracle("forward", z[:, known], log_t)
        spoilt = z.isnan().any(-1) | (z == INF).any(-1) | (z[:, known] == -INF).all(-1)
        gradient = torch.zeros_like(z).index_copy(1, torch.tensor(known), gradient)
        return value.masked_fill(spoilt, NAN), gradient.masked_fill(spoilt[:, None], NAN)
    log_s = z.log_softmax(-1)
    s, t = log_s.exp(), log_t.exp()
    left, log_rest = 1 - t.sum(-1), log_s[:, rest].logsumexp(-1)
    left = torch.where(left < torch.finfo(z.dtype).eps, 0.0, left)
    value = times(t, log_t - log_s[:, known]).sum(-1) + times(left, left.log() - log_rest)
    inside = z[:, rest].softmax(-1)
    inside = torch.where((z[:, rest] == -INF).all(-1, keepdim=True) & ~s.isnan().any(-1, keepdim=True), 0.0, inside)
    gradient = torch.zeros_like(z).index_copy(1, torch.tensor(known), s[:, known] - t)
    return value, gradient.index_copy(1, torch.tensor(rest), (log_rest.exp() - left)[:, None] * inside)


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("level", [-100.0, -1000.0, 1000.0])
def test_every_entry_is_known_and_every_logit_is_far_from_zero(run, tail, level):
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(2, 40, generator=generator) for _ in range(2))
    indices = torch.stack([torch.randperm(40, generator=generator) for _ in range(2)])
    student = student + level
    logprobs = teacher.double().log_softmax(-1).gather(-1, indices).float()
    got = run(ops.sparse_kl_div, [student], [indices, logprobs], tail=tail)
    want, narrow = (oracle("forward", student.to(d), teacher.to(d)) for d in (torch.float64, torch.float32))
    for ours, theirs, exact in zip(got, narrow, want, strict=True):
        assert_as_exact_as(ours, theirs, exact, gamma(40 + EXPONENTIAL + 20))


@pytest.mark.parametrize("target", ["forward", "reverse", "jsd"])
def test_a_row_of_weight_0_reaches_no_gradient(run, target):
    """Rows whose hidden states are infinite or NaN, beside one that counts."""
    generator = torch.Generator().manual_seed(3)
    hidden, weight, other = (torch.randn(*shape, generator=generator) for shape in ((4, 8), (VOCABULARY, 8), (VOCABULARY, 8)))
    hidden[0, 0], hidden[1, 3], hidden[2] = NAN, INF, NAN
    token_weight = torch.tensor([0.0, 0.0, 0.0, 2.0])
    options = {"divergence": target, "token_weight": token_weight, "beta": 0.3}
    loss, *gradients = run(ops.linear_kl_div, [hidden, weight], [hidden, other], **options)
    assert not loss[:3].any() and not gradients[0][:3].any()

    def exact(dtype):
        h, w, w_t = (t.to(dtype) for t in (hidden[3:], weight, other))
        value, dz = (2 * t for t in oracle(target, h @ w.T, h @ w_t.T))
        return value, dz @ w, dz.T @ h

    floor = gamma(VOCABULARY + 8 + EXPONENTIAL + 20)
    got = (loss[3:], gradients[0][3:], gradients[1])
    for ours, theirs, right in zip(got, exact(torch.float32), exact(torch.float64), strict=True):
        assert_as_exact_as(ours, theirs, right, 4 * floor, scale=1.0)


@pytest.mark.parametrize("plan", ["chunk", "recompute"])
@pytest.mark.parametrize("target", ["forward", "reverse", "jsd", "uniform", "own", "labels"])
def test_biases_and_padding(run, plan, target):
    """-inf from the heads' biases: one entry on both sides and, apart from reverse KL, one in the student and one in the teacher."""
    generator = torch.Generator().manual_seed(2)
    hidden, weight, other = (torch.randn(*shape, generator=generator) for shape in ((4, 8), (VOCABULARY, 8), (VOCABULARY, 8)))
    bias = {side: torch.randn(VOCABULARY, generator=generator) for side in "st"}
    bias["s"][3] = bias["t"][3] = -INF
    bias["s"][7] = -INF
    if target == "jsd":
        bias["t"][160] = -INF
    for b in bias.values():
        b[290:] = NAN  # padding
    labels = torch.tensor([0, 3, 299 - 10, 7])
    student, options = [hidden, weight, bias["s"]], {"vocab_size": 290, "plan": plan, "bias": 2}
    if target == "uniform":
        got = run(ops.linear_uniform_kl, student, **options)
    elif target == "own":
        got = run_lse(run, student, options)
    elif target == "labels":
        got = run(ops.linear_cross_entropy, student, [labels], **options)
    else:
        options["student_bias"] = options.pop("bias")
        more = {"beta": 0.3} if target == "jsd" else {}
        op = lambda h, w, h_t, w_t, **o: ops.linear_kl_div(h, w, h_t, w_t, student_bias=o.pop("bias"), **o)  # noqa: E731
        options["bias"] = options.pop("student_bias")
        got = run(op, student, [hidden, other], teacher_bias=bias["t"], divergence=target, **options, **more)

    def exact(dtype):
        h, w, b, w_t, b_t = (t.to(dtype) for t in (hidden, weight, bias["s"], other, bias["t"]))
        z_s, z_t = ((h @ m.T + c)[:, :290] for m, c in ((w, b), (w_t, b_t)))
        if target in ("own", "labels"):
            at = torch.nn.functional.one_hot(labels, 290).to(dtype) * (target == "labels")
            value, dz = z_s.logsumexp(-1), z_s.softmax(-1) - at
            value = value if target == "own" else -z_s.log_softmax(-1).gather(1, labels[:, None])[:, 0]
        else:
            value, dz = oracle(target, z_s, torch.zeros_like(z_s) if target == "uniform" else z_t)
        pad = lambda t: torch.nn.functional.pad(t, (0, 0) * (t.ndim - 1) + (0, VOCABULARY - 290))  # noqa: E731
        return value, dz @ w[:290], pad(dz.T @ h), pad(dz.sum(0))

    floor = gamma(VOCABULARY + 8 + EXPONENTIAL + 20)
    for name, ours, theirs, right in zip(
        ("loss", "hidden", "weight", "bias"), got, exact(torch.float32), exact(torch.float64), strict=True
    ):
        assert_as_exact_as(ours, theirs, right, 4 * floor, name)


@pytest.mark.parametrize("target", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("given", [False, True])
def test_a_masked_token_counts_for_its_label_whatever_the_teacher_holds(run, target, given):
    """Its divergence does not count, and neither its value nor its gradient reaches those of the label."""
    generator = torch.Generator().manual_seed(6)
    hidden, other = (torch.randn(4, VOCABULARY if given else 16, generator=generator) for _ in range(2))
    heads = [] if given else [torch.randn(VOCABULARY, 16, generator=generator) for _ in range(2)]
    mask, labels = torch.tensor([True, False, False, True]), torch.tensor([1, 2, -100, 3])
    clean = other.clone()
    other[1], other[2] = NAN, INF
    found = []
    for teacher in (other, clean):
        tensors = ([hidden, heads[0]], [teacher, heads[1]]) if heads else ([hidden], [teacher])
        op = ops.linear_kl_div if heads else ops.kl_div
        found.append(run(op, *tensors, mask=mask, labels=labels, label_weight=0.5, divergence=target))
    # The student's probability is computed beside the teacher's, whatever that is: not the same bits.
    for got, want in zip(*found, strict=True):
        assert want.isfinite().all() and relative(got, want) <= gamma(VOCABULARY + EXPONENTIAL + 20)


def run_lse(run, student, options):
    return run(lambda h, w, *, reduction, **o: ops.linear_lse(h, w, **o), student, **options)
