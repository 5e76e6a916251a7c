"""What float32 and 16 bits leave of the C++ losses: near agreement, at the ends of their ranges, beyond them."""

import math

import pytest
import torch
import torch.nn.functional as F
from bfloat16_ways import WAYS, use_way
from near_agreement import LOSS_LIMIT, SOFTCAP, approach, gradient_limit, random_teacher
from rounding import EXPONENTIAL, difference_form_error, gamma, relative, unit
from undo_kernels import cpu
from vocab_losses import VOCABULARY, assert_as_exact_as_torch, divergence, draw, gradients, logit_gradient, logits, near_logits

from undo_core import ops

pytestmark = [
    pytest.mark.skipif(cpu.vocab_loss.kernels is None, reason="no C++ compiler was here when undo-core was installed"),
    pytest.mark.usefixtures("small_tiles"),
]


@pytest.mark.parametrize(
    ("dtype", "way"),
    [(torch.float32, None), (torch.float16, None), *((torch.bfloat16, way) for way in WAYS)],
    ids=["float32", "float16", *(f"bfloat16 {way}" for way in WAYS)],
)
@pytest.mark.parametrize("source", ["random 1", "random 3", "trained"])
@pytest.mark.parametrize("plan", ["chunk", "recompute"])
@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_the_gradient_stays_right_as_the_student_approaches_the_teacher(kind, plan, source, dtype, way, trained, monkeypatch):
    """The property of the difference form: the gradient's relative error does not grow as KL goes from 1 to 1e-6."""
    if way:
        use_way(way, monkeypatch)
    drawn = trained if source == "trained" else random_teacher(float(source.split()[1]))
    options = {"student_softcap": SOFTCAP, "teacher_softcap": SOFTCAP, "divergence": kind, "plan": plan}
    for near in approach(*drawn, kind, dtype):
        loss, gradient = near.errors(lambda h, w, near=near: ops.linear_kl_div(h, w, near.teacher, near.weight, **options))
        assert loss < LOSS_LIMIT and gradient < gradient_limit(dtype, near.kl), (near.kl, loss, gradient)


def test_no_worse_than_torch_in_the_same_dtype():
    for dtype in (torch.float32, torch.bfloat16):
        h, w, _, _ = draw(spread=3.0, dtype=dtype)
        th = h + (torch.randn(h.shape, generator=torch.Generator().manual_seed(4)) * 0.1).to(dtype)
        exact = [t.double().requires_grad_() for t in (h, w)]
        wanted = gradients(divergence(logits(*exact), logits(th, w), "forward").mean(), exact)
        errors = []
        for function in (
            lambda h, w, th: ops.linear_kl_div(h, w, th, w.detach(), plan="chunk"),
            lambda h, w, th: F.kl_div(
                (h @ w.T).log_softmax(-1), (th @ w.detach().T).log_softmax(-1), log_target=True, reduction="batchmean"
            ),
        ):
            inputs = [h.clone().requires_grad_(), w.clone().requires_grad_()]
            errors.append([relative(a, b) for a, b in zip(gradients(function(*inputs, th), inputs), wanted, strict=True)])
        assert all(ours <= theirs + unit(dtype) for ours, theirs in zip(*errors, strict=True)), errors


def test_peaked_logits_are_as_good_as_float32_logits_allow():
    """At a standard deviation of 10 the projection's own rounding rules; the bound is twice what a float64 epilogue leaves."""
    h, w, _, _ = draw(width=64, spread=10.0)
    th = h + torch.randn(h.shape, generator=torch.Generator().manual_seed(4)) * 0.01
    exact = [t.double().requires_grad_() for t in (h, w)]
    wanted = gradients(divergence(logits(*exact), logits(th, w), "forward").mean(), exact)
    inputs = [h.clone().requires_grad_(), w.clone().requires_grad_()]
    got = gradients(ops.linear_kl_div(*inputs, th, w, plan="chunk"), inputs)
    z = (h @ w.T).double().requires_grad_()
    (dz,) = gradients(divergence(z, (th @ w.T).double(), "forward").mean(), [z])
    for a, b, best in zip(got, wanted, (dz @ w.double(), dz.T @ h.double()), strict=True):
        assert relative(a, b) <= 2 * relative(best, b)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize(("spread", "near"), [(1, 1e-3), (10, 0.1), (10, 1e-5), (30, 1e-3)])
def test_peaked_teachers_that_the_student_agrees_with(kind, spread, near):
    """On given logits: the gap of the log-sum-exps is not the difference of two float32 sums."""
    generator = torch.Generator().manual_seed(2)
    z_s = torch.randn(8, 1500, generator=generator) * spread
    z_t = z_s + torch.randn(8, 1500, generator=generator) * near
    inputs, wanted = z_s.clone().requires_grad_(), logit_gradient(z_s, z_t, kind)
    (got,) = gradients(ops.kl_div(inputs, z_t, divergence=kind, reduction="sum", plan="chunk"), [inputs])
    assert wanted.norm() > 1e-9 and (got.double() - wanted).norm() <= difference_form_error(z_s, z_t).norm()


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("spread", [1, 4, 12])
def test_the_gap_of_the_log_sum_exps_has_no_rounding_of_the_sums(kind, spread):
    z_s, z_t = near_logits(8, 1500, spread)
    inputs = z_s.clone().requires_grad_()
    (got,) = gradients(ops.kl_div(inputs, z_t, divergence=kind, reduction="sum", plan="chunk"), [inputs])
    assert relative(got, logit_gradient(z_s, z_t, kind)) < 1e-3


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_student_that_is_its_teacher_gets_no_gradient(kind, reduction):
    h, w, _, _ = draw()
    inputs = [h.clone().requires_grad_(), w.clone().requires_grad_()]
    loss = ops.linear_kl_div(*inputs, h, w, divergence=kind, reduction=reduction, plan="chunk")
    assert not loss.any() and not any(g.any() for g in gradients(loss.sum(), inputs))


@pytest.mark.parametrize("beta", [1e-6, 1e-3, 0.999, 1 - 1e-6])
@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0])
def test_jsd_near_its_end_points(beta, spread):
    h, w, th, tw = draw(spread=spread)
    assert_as_exact_as_torch(
        lambda h, w: ops.linear_kl_div(h, w, th, tw, divergence="jsd", beta=beta, plan="chunk"),
        lambda h, w: divergence(logits(h, w), logits(th, tw), "jsd", beta).mean(),
        [h, w],
    )


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("plan", ["chunk", "direct"])
def test_sparse_teachers_at_their_edges(tail, plan):
    z = torch.zeros(3, 1500)
    z[:, 0] = torch.tensor([60.0, 104.0, 300.0])  # the rest's probability underflows
    z.requires_grad_()
    known = torch.tensor([[0, 7]] * 3), torch.tensor([[math.log(0.5), -math.inf]] * 3)
    loss = ops.sparse_kl_div(z, *known, tail=tail, reduction="sum", plan=plan)
    (gradient,) = gradients(loss, [z])
    assert loss.isfinite() and gradient.isfinite().all()
    if tail == "bucket":
        torch.testing.assert_close(gradient[:, 0], torch.full((3,), 0.5), rtol=gamma(1500 + 2 * EXPONENTIAL), atol=0)
    nothing = ops.sparse_kl_div(z, torch.zeros(3, 0, dtype=torch.long), torch.zeros(3, 0), tail=tail, plan=plan)
    assert nothing == 0


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_extreme_logits_stay_finite(kind, size):
    generator = torch.Generator().manual_seed(1)
    z_s, z_t = (torch.randn(6, 700, generator=generator) * size for _ in range(2))
    z_s[0, :3], z_t[0, :3] = -size * 3, -size * 3  # both probabilities underflow
    z_s.requires_grad_()
    loss = ops.kl_div(z_s, z_t, divergence=kind, beta=0.4, reduction="none", plan="chunk")
    (gradient,) = gradients(loss.sum(), [z_s])
    assert loss.isfinite().all() and (loss >= 0).all() and gradient.isfinite().all()
    wanted = divergence(z_s.detach().double(), z_t.double(), kind, 0.4)
    largest = max(float(z.detach().abs().max()) for z in (z_s, z_t))  # every logarithm errs by a few units of it
    torch.testing.assert_close(loss.detach().double(), wanted, rtol=gamma(128 + EXPONENTIAL), atol=16 * unit() * largest)


def test_nan_reaches_its_own_row_and_no_other():
    h, w, th, tw = draw(rows=20)
    for value in (torch.nan, torch.inf):
        dirty = h.clone()
        dirty[7] = value
        for loss in (
            ops.linear_kl_div(dirty, w, th, tw, reduction="none", plan="chunk"),
            ops.linear_kl_div(h, w, torch.where(torch.arange(20)[:, None] == 7, value, th), tw, reduction="none", plan="chunk"),
            ops.linear_lse(dirty, w, plan="chunk"),
        ):
            assert loss[7].isnan() and loss[torch.arange(20) != 7].isfinite().all()


def test_a_sixteen_bit_head_with_a_bias(bfloat16):
    h, w, _, _ = draw(rows=20, width=64, dtype=torch.bfloat16)
    bias, labels = torch.zeros(VOCABULARY, dtype=torch.bfloat16), torch.arange(20) * 100
    for plan in ("chunk", "recompute"):
        inputs = [t.clone().requires_grad_() for t in (h, w, bias)]
        exact = [t.double().requires_grad_() for t in (h, w, bias)]
        got = ops.linear_cross_entropy(*inputs[:2], labels, bias=inputs[2], plan=plan)
        wanted = F.cross_entropy(logits(*exact[:2], bias=exact[2]), labels)
        for a, b in zip(gradients(got, inputs), gradients(wanted, exact), strict=True):
            # the gradient of the logits is rounded where there are AMX tiles, and the result is
            assert a.dtype == torch.bfloat16 and relative(a, b) < 2 * unit(torch.bfloat16)
