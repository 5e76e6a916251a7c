"""What float32 and 16 bits leave of the Triton losses: near agreement, at the ends of their ranges, beyond them."""

import dataclasses
import itertools
import math

import pytest
import torch
import triton
import triton.language as tl
from rounding import EXPONENTIAL, assert_as_exact_as, difference_form_error, gamma, probability_error
from triton_problems import (
    DENSE,
    DEVICE,
    SPARSE,
    TARGETS,
    check,
    error,
    oracle,
    oracle_logits,
    problem,
    same_dtype,
    vocab_loss,
)
from undo_kernels import backend
from undo_kernels.problem import Problem
from undo_kernels.projection import GivenLogits, Projection
from undo_kernels.triton import math as elementary
from undo_kernels.triton import tile_table
from undo_kernels.triton import vocab_loss as driver
from undo_kernels.triton.run import math_of
from undo_kernels.triton.shapes import Shapes

from undo_core import ops

# The interpreter is numpy: it warns where a kernel meets the NaN and the infinities that a test feeds it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def apart_by(deviation, target, plan, dtype, **options):
    """A student whose logits differ from its teacher's by so much: the bias, in float32, moves what 16 bits could not."""
    p = problem(
        target, rows=4, vocabulary=251, widths=(24, 24), dtype=dtype, spread=3.0, apart=0.0, factor=1.0, plan=plan, bias=True,
        needs=(True, True, True), **options,
    )  # fmt: skip
    bias = deviation * torch.randn(251, generator=torch.Generator().manual_seed(1))
    student, teacher = (dataclasses.replace(side, bias=b) for side, b in ((p.student, bias), (p.teacher, torch.zeros(251))))
    return dataclasses.replace(p, student=student, teacher=teacher)


@pytest.mark.parametrize("plan", ["chunk", "recompute"])
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("target", DENSE)
def test_gradient_as_the_divergence_vanishes(target, softcap, plan):
    """Relative error of the gradients from a KL of about 1 to 1e-6, logits of standard deviation 3."""
    for dtype in (torch.bfloat16, torch.float32):
        reached = []
        for apart in (1.2, 0.036, 0.0018):
            p = apart_by(apart, target, plan, dtype, softcap=softcap)
            want, got = oracle(p), vocab_loss(p)
            kl = float(want["divergence"].mean())
            reached.append(kl)
            worst = max(error(getattr(got, n), want[n]) for n in ("d_hidden", "d_weight"))
            bound = 0.01 if dtype == torch.bfloat16 else (1e-4 if kl > 1e-3 else 3e-3)
            assert worst < bound, (dtype, kl, worst)
            assert error(got.divergence, want["divergence"]) < 1e-3, (dtype, kl)
            assert (got.divergence >= 0).all()
        assert max(reached) > 0.1
        assert min(reached) < 1e-6


@pytest.mark.parametrize(("softcap", "temperature", "exact"), [(34.0, 1.0, False), (30.0, 0.5, True), (1000.0, 1.0, True)])
def test_gradient_of_16_bit_inputs_is_as_exact_beside_any_softcap(softcap, temperature, exact):
    """The approximate tanh errs by 3e-7 of the cap: up to a cap of 34 that is within the bound, above it the exact one is taken."""
    for target, plan in itertools.product(DENSE, ("chunk", "recompute")):
        p = apart_by(0.0018, target, plan, torch.bfloat16, softcap=softcap, temperature=temperature)
        assert Shapes(p, tile_table.INTERPRETER).exact == exact
        want, got = oracle(p), vocab_loss(p)
        assert 1e-7 < want["divergence"].mean() < 1e-5
        assert error(got.divergence, want["divergence"]) < 1e-3, (target, plan)
        for name in ("d_hidden", "d_weight"):
            assert error(getattr(got, name), want[name]) < 0.01, (target, plan, name)


@pytest.mark.parametrize("steep", ["student", "teacher"])
@pytest.mark.parametrize("other", [None, 30.0])
def test_one_large_softcap_is_enough_for_exact_functions(steep, other):
    """The functions are the kernel's, so that a steep teacher beside a flat student needs the exact ones too."""
    for target, plan in itertools.product(("forward", "reverse"), ("chunk", "recompute")):
        p = apart_by(0.05, target, plan, torch.bfloat16, softcap=other)
        p = dataclasses.replace(p, **{steep: dataclasses.replace(getattr(p, steep), softcap=300.0)})
        assert Shapes(p, tile_table.INTERPRETER).exact
        want, got = oracle(p), vocab_loss(p)
        assert error(got.divergence, want["divergence"]) < 1e-3, (target, plan)
        for name in ("d_hidden", "d_weight"):
            assert error(getattr(got, name), want[name]) < 0.01, (target, plan, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("plan", ["chunk", "recompute"])
@pytest.mark.parametrize("target", DENSE)
def test_gradient_on_hidden_states_of_a_trained_model(target, plan, dtype, trained):
    """The same bounds where logits are not normal: eight tokens, a quarter of the vocabulary of a model that has learnt something."""
    hidden, weight, step = trained
    hidden, weight = hidden[:8], weight[:256].to(dtype)
    step = step[:8] * hidden.norm() / step[:8].norm()
    side = Projection(hidden.to(dtype), weight, softcap=30.0)
    seen = []
    for size in (2.0, 0.1, 0.004):
        student = dataclasses.replace(side, hidden=(hidden.to(dtype).float() + size * step).to(dtype))
        p = Problem(student, target, torch.ones(8), teacher=side, needs=(True, True, False), plan=plan)
        want, got = oracle(p), vocab_loss(p)
        kl = float(want["divergence"].mean())
        seen.append(kl)
        bound = 0.01 if dtype == torch.bfloat16 else 1e-4 if kl >= 1e-3 else 3e-3
        assert (got.divergence >= 0).all()
        assert error(got.divergence, want["divergence"]) < 1e-3, kl
        for name in ("d_hidden", "d_weight"):
            assert error(getattr(got, name), want[name]) < bound, (kl, name)
    assert max(seen) > 0.1
    assert min(seen) < (1e-5 if dtype == torch.float32 else 1e-4), seen


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("plan", ["chunk", "recompute"])
@pytest.mark.parametrize("target", DENSE)
@pytest.mark.parametrize(("spread", "near"), [(3, 1e-3), (10, 0.1), (10, 1e-3)])
def test_peaked_heads_whose_products_are_exact(spread, near, target, plan, reduction):
    """Every row of a plan that keeps no logits, and of a backward that is given both log-sum-exps in float32."""
    g = torch.Generator().manual_seed(2)
    z_s = torch.randn(8, 500, generator=g) * spread
    z_t = z_s + torch.randn(8, 500, generator=g) * near
    head, other, eye = (t.T.contiguous().to(DEVICE) for t in (z_s, z_t, torch.eye(8)))
    head.requires_grad_()
    with backend("triton"):
        value = ops.linear_kl_div(eye, head, eye, other, divergence=target, plan=plan, reduction=reduction)
        got = torch.autograd.grad(value.sum(), [head])[0].cpu()
    s, t = z_s.double().log_softmax(-1), z_t.double().log_softmax(-1)
    x = s - t
    if target == "forward":
        want = t.exp() * x.expm1()
    else:
        x = x if target == "reverse" else 0.5 * (s - torch.logaddexp(s, t) + math.log(2))
        want = s.exp() * (x - (s.exp() * x).sum(-1, keepdim=True))
    assert (got.T - want).norm() <= difference_form_error(z_s, z_t, z_s.shape[1]).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("plan", ["chunk", "recompute"])
@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_counted_in_spoilt_memory_is_zero(rows, plan, dtype):
    modes = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    p = problem("jsd", rows=rows, masked=1.1, bias=True, labels=True, plan=plan, dtype=dtype, vocabulary=37)
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)  # of what it warns on a GPU, nothing is used here
        torch.utils.deterministic.fill_uninitialized_memory = True  # with NaN
        got = vocab_loss(p)
    finally:
        torch.use_deterministic_algorithms(modes[0])
        torch.utils.deterministic.fill_uninitialized_memory = modes[1]
    assert not any(t.any() for t in (got.total, got.divergence, got.d_hidden, got.d_weight, got.d_bias))


def test_float16_gradient_does_not_underflow():
    for plan in ("chunk", "recompute"):
        p = problem("forward", rows=4, vocabulary=251, dtype=torch.float16, apart=0.0, factor=1e-7, plan=plan, bias=True)
        bias = 1e-3 * torch.randn(251, generator=torch.Generator().manual_seed(1))
        p = dataclasses.replace(
            p, student=dataclasses.replace(p.student, bias=bias), teacher=dataclasses.replace(p.teacher, bias=torch.zeros(251))
        )
        want, got = oracle(p), vocab_loss(p)
        assert want["divergence"].max() < 1e-5
        assert error(got.d_weight, want["d_weight"]) < 0.01
        assert error(got.d_hidden, want["d_hidden"]) < 0.01


@pytest.mark.parametrize("plan", ["chunk", "recompute"])
@pytest.mark.parametrize("target", TARGETS)
def test_extreme_logits_stay_finite(target, plan):
    got = vocab_loss(problem(target, spread=1e4, rows=4, labels=True, plan=plan))
    for value in got:
        assert torch.isfinite(value).all()


def test_extreme_logits_sparse():
    for target in SPARSE:
        got = vocab_loss(problem(target, spread=1e4, rows=4, labels=True))
        assert all(torch.isfinite(value).all() for value in got)


def test_unrelated_student_and_teacher():
    """Log-sum-exps far apart: log1p(E_t[expm1(delta)]) would be noise here."""
    for target, plan in itertools.product(("forward", "reverse"), ("chunk", "recompute")):
        p = problem(target, rows=4, spread=8.0, widths=(40, 12), bias=True, plan=plan)
        check(dataclasses.replace(p, teacher=dataclasses.replace(p.teacher, bias=p.teacher.bias + 60)))
        check(dataclasses.replace(p, student=dataclasses.replace(p.student, bias=p.student.bias + 300)))


def test_both_probabilities_underflow():
    z = torch.zeros(2, 64)
    z[:, 1:] = -200.0
    z[:, 5] = -300.0
    for target in DENSE:
        student, teacher = GivenLogits(z.clone(), z), GivenLogits(z * 1.5, z)
        got = vocab_loss(
            Problem(student=student, target=target, factor=torch.ones(2), teacher=teacher, needs=(True, False, False))
        )
        assert torch.equal(got.divergence, torch.zeros(2))
        assert torch.equal(got.d_hidden, torch.zeros(2, 64))


@pytest.mark.parametrize("plan", ["chunk", "recompute"])
@pytest.mark.parametrize("target", [*TARGETS])
def test_nan_reaches_its_row_and_no_other(target, plan):
    p = problem(target, rows=4, labels=True, plan=plan, needs=(True, False, False))
    p.student.hidden[2, 3] = math.nan
    got = vocab_loss(p)
    lost = got.nll if target == "own" else got.divergence
    assert lost.isnan().tolist() == [False, False, True, False]
    assert got.d_hidden.isnan().any(1).tolist() == [False, False, True, False]
    assert got.total.isnan()


def test_teachers_nan():
    for target, plan in itertools.product(DENSE, ("chunk", "recompute")):
        p = problem(target, rows=3, plan=plan)
        p.teacher.hidden[1] = math.nan
        assert vocab_loss(p).divergence.isnan().tolist() == [False, True, False]


def test_label_gradient_without_cancellation():
    """p - 1 of a label that is almost certain."""
    z = torch.zeros(1, 70)
    z[0, 3] = 12.0
    side = GivenLogits(z, z)
    p = Problem(side, "own", torch.zeros(1), torch.ones(1), torch.tensor([3]), needs=(True, False, False))
    got, want = vocab_loss(p), oracle(p)
    # the sum is 1 + 4e-4, so what float32 keeps of it beside the 1 is right to a few units of 1
    assert abs(got.d_hidden[0, 3] - want["d_hidden"][0, 3]) < gamma(2 + EXPONENTIAL)
    assert abs(got.nll[0] - want["nll"][0]) < gamma(2 + EXPONENTIAL) < 0.01 * want["nll"][0]


@pytest.mark.parametrize("beta", [1e-6, 1e-3, 0.999, 1 - 1e-6])
@pytest.mark.parametrize("spread", [0.1, 5.0])
def test_jsd_near_its_end_points(beta, spread):
    p = problem("jsd", rows=3, beta=beta, spread=spread, factor=1.0)
    want, plain, got = oracle(p), same_dtype(p), vocab_loss(p)
    for name in ("divergence", "d_hidden"):
        floor = probability_error(p.student.hidden, p.student.weight, p.student.vocabulary)
        assert_as_exact_as(getattr(got, name), plain[name], want[name], floor, name)


@pytest.mark.parametrize("beta", [1e-4, 0.04, 0.06, 0.94])
@pytest.mark.parametrize("apart", [0.3, 0.004])
def test_jsd_of_unequal_weights_with_16_bit_inputs(beta, apart):
    """On both sides of the weight from which the short form is taken; logits differ by about 0.25, and by less."""
    p = problem("jsd", rows=3, vocabulary=251, widths=(24, 24), dtype=torch.bfloat16, spread=3.0, softcap=30.0, beta=beta, factor=1.0,
                apart=0.0, bias=True, needs=(True, True, True), plan="recompute")  # fmt: skip
    bias = apart * torch.randn(251, generator=torch.Generator().manual_seed(1))
    student, teacher = (dataclasses.replace(side, bias=b) for side, b in ((p.student, bias), (p.teacher, torch.zeros(251))))
    p = dataclasses.replace(p, student=student, teacher=teacher)
    want, got = oracle(p), vocab_loss(p)
    assert error(got.divergence, want["divergence"]) < 1e-3
    assert max(error(getattr(got, name), want[name]) for name in ("d_hidden", "d_weight")) < 0.01


@pytest.mark.parametrize("target", DENSE)
@pytest.mark.parametrize(("spread", "near"), [(10, 0.1), (10, 1e-5), (30, 1e-3)])
def test_peaked_teachers_that_the_student_agrees_with(target, spread, near):
    """The gap of the log-sum-exps is not the difference of two float32 sums; 300 columns are two blocks in two parts."""
    g = torch.Generator().manual_seed(2)
    z_s = torch.randn(4, 300, generator=g) * spread
    z_t = z_s + torch.randn(4, 300, generator=g) * near
    teacher = GivenLogits(z_t, z_t)
    got = vocab_loss(Problem(GivenLogits(z_s, z_s), target, torch.ones(4), teacher=teacher, needs=(True, False, False)))
    s, t = z_s.double().log_softmax(-1), z_t.double().log_softmax(-1)
    x = s - t
    if target == "forward":
        want = t.exp() * x.expm1()
    else:
        half = torch.logaddexp(s, t) - math.log(2)
        x = x if target == "reverse" else 0.5 * (s - half)
        want = s.exp() * (x - (s.exp() * x).sum(-1, keepdim=True))
    assert (got.d_hidden - want).norm() <= difference_form_error(z_s, z_t, z_s.shape[1]).norm()


@pytest.mark.parametrize(("dtype", "softcap"), [(torch.float32, 7.0), (torch.bfloat16, 7.0), (torch.bfloat16, None)], ids=str)
@pytest.mark.parametrize("plan", ["chunk", "recompute"])
@pytest.mark.parametrize("target", DENSE)
def test_a_student_that_is_its_teacher_gets_no_gradient(target, plan, dtype, softcap):
    p = problem(target, plan=plan, spread=3.0, softcap=softcap, dtype=dtype)
    p = dataclasses.replace(p, teacher=p.student)
    first = vocab_loss(p)
    for got in (first, vocab_loss(dataclasses.replace(p, lse_s=first.lse_s, lse_t=first.lse_t))):
        assert not any(t.any() for t in (got.divergence, got.d_hidden, got.d_weight))


def test_sparse_teacher_that_leaves_nothing():
    p = problem("bucket", rows=3, k=3)
    logprobs = torch.log_softmax(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double(), -1).float()
    p = dataclasses.replace(p, indices=torch.tensor([[0, 5, 9], [3, 2, 1], [7, 8, 100]]), logprobs=logprobs)
    got = vocab_loss(p)
    z = oracle_logits(p.student, p.student.hidden.double(), p.student.weight.double(), None)
    log_s = torch.log_softmax(z, -1).gather(1, p.indices)
    want = (logprobs.double().exp() * (logprobs.double() - log_s)).sum(-1)
    # a logarithm of a probability errs by this, and the loss is a mean of them
    error = probability_error(p.student.hidden, p.student.weight, p.student.vocabulary)
    torch.testing.assert_close(got.divergence.double(), want, atol=error, rtol=error)


def test_sparse_teachers_at_their_edges():
    """The rest's probability underflows, a known one is 0, nothing is known."""
    z = torch.zeros(3, 150)
    z[:, 0] = torch.tensor([60.0, 104.0, 300.0])
    known = {"indices": torch.tensor([[0, 7]] * 3), "logprobs": torch.tensor([[math.log(0.5), -math.inf]] * 3)}
    nothing = {"indices": torch.zeros(3, 0, dtype=torch.int64), "logprobs": torch.zeros(3, 0)}
    for target in SPARSE:
        got = vocab_loss(Problem(GivenLogits(z, z), target, torch.ones(3), needs=(True, False, False), **known))
        assert got.divergence.isfinite().all()
        assert got.d_hidden.isfinite().all()
        if target == "bucket":
            torch.testing.assert_close(got.d_hidden[:, 0], torch.full((3,), 0.5), rtol=gamma(150 + 2 * EXPONENTIAL), atol=0)
        assert vocab_loss(Problem(GivenLogits(z, z), target, torch.ones(3), **nothing)).total == 0


@pytest.mark.parametrize("target", SPARSE)
def test_sparse_gradient_as_the_divergence_vanishes(target):
    for apart in (1.0, 1e-2, 1e-3):
        p = problem(target, rows=3, vocabulary=200, k=20, given=True, needs=(True, False, False))
        log_s = torch.log_softmax(p.student.hidden.double(), -1)
        noise = torch.randn(p.student.hidden.shape, generator=torch.Generator().manual_seed(2))
        indices = torch.stack([torch.randperm(200, generator=torch.Generator().manual_seed(i))[:20] for i in range(3)])
        logprobs = torch.log_softmax(log_s + apart * noise, -1).gather(1, indices)  # float64, as a caller may have it
        p = dataclasses.replace(p, indices=indices, logprobs=logprobs, factor=torch.ones(3))
        want, got = oracle(p), vocab_loss(p)
        assert error(got.d_hidden, want["d_hidden"]) < (1e-4 if apart > 0.1 else 3e-3)
        assert error(got.divergence, want["divergence"]) < 1e-3


@triton.jit
def _functions(x_ptr, out_ptr, MATH: tl.constexpr, BLOCK: tl.constexpr):
    o_x = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + o_x)
    tl.store(out_ptr + o_x, elementary.exp2(x, MATH))
    tl.store(out_ptr + BLOCK + o_x, elementary.reciprocal(x, MATH))
    tl.store(out_ptr + 2 * BLOCK + o_x, elementary.log(x, MATH))


def test_approximate_functions_err_as_documented():
    """On a GPU the instructions themselves; interpreted, errors as large as PTX documents: about half of them above half of that."""
    x = torch.linspace(0.01, 40.0, 4096)
    out = torch.empty(3, 4096, device=DEVICE)
    _functions[(1,)](x.to(DEVICE), out, MATH=math_of(tile_table.target_of(DEVICE), False), BLOCK=4096)
    got, wide = out.cpu().double(), x.double()
    rounding = gamma(4)  # of the interpreter's own function, two units, and of two products
    for value, want, bound in zip(got, (wide.exp2(), 1 / wide, wide.log()), (2.0**-22, 2.0**-23, 2.0**-22), strict=True):
        size = want.abs().clamp_min(math.log(2.0) * bool((want < 0).any()))  # a logarithm's error is absolute near 1
        apart = (value - want).abs() / size
        assert apart.max() <= bound + rounding
        assert not driver.INTERPRETED or apart.max() > bound / 2


@pytest.mark.parametrize("target", DENSE)
def test_suppressed_entries_of_16_bit_logits(target):
    """An entry that both sides give no probability counts for nothing, and one that the first argument gives none has its limit."""
    g = torch.Generator().manual_seed(3)
    z_s, z_t = (torch.randn(3, 70, generator=g).mul(3).bfloat16() for _ in range(2))

    def loss(s, t):
        p = Problem(GivenLogits(s, s), target, torch.ones(3), teacher=GivenLogits(t, t), needs=(True, False, False))
        return vocab_loss(p)

    keep = torch.arange(70) != 5
    want = loss(z_s[:, keep].contiguous(), z_t[:, keep].contiguous())
    z_s[:, 5] = z_t[:, 5] = -math.inf
    got = loss(z_s, z_t)
    torch.testing.assert_close(got.divergence, want.divergence, rtol=1e-5, atol=0)
    assert not got.d_hidden[:, 5].any() and torch.isfinite(got.d_hidden).all()
    first = z_t if target == "forward" else z_s
    first[:, 9] = -math.inf
    got = loss(z_s, z_t)
    assert torch.isfinite(got.divergence).all() and torch.isfinite(got.d_hidden).all()
    second = z_s if target == "forward" else z_t
    second[:, 11] = -math.inf
    assert loss(z_s, z_t).divergence.isinf().all() == (target != "jsd")
