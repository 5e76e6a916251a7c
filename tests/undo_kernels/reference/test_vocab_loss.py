"""The losses against float64 formulas that share no code with them.

Where a comparison states no bound both sides are float64: torch's 1e-7 is then 10**8 roundings, and a mistake is more.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import EXPONENTIAL, gamma, probability_error
from undo_kernels import backend
from vocab_losses import divergence, logits

from undo_core import ops


def draw(rows=9, vocabulary=37, width=6, dtype=torch.float64, seed=0, spread=1.0, teacher_width=None):
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    teacher_width = teacher_width or width
    hidden, weight = make(rows, width) * spread, make(vocabulary, width) / width**0.5
    teacher_hidden, teacher_weight = make(rows, teacher_width) * spread, make(vocabulary, teacher_width) / teacher_width**0.5
    return [t.to(dtype) for t in (hidden, weight, teacher_hidden, teacher_weight)]


OPTIONS = [
    {},
    {"softcap": 2.5},
    {"scale": 0.3, "temperature": 1.7},
    {"bias": True, "softcap": 4.0, "scale": 1.5, "temperature": 0.6},
    {"vocab_size": 29},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("kind", "beta"), [("forward", 0.5), ("reverse", 0.5), ("jsd", 0.5), ("jsd", 0.1), ("jsd", 0.93)])
def test_kl_and_its_gradients(kind, beta, options):
    h, w, th, tw = draw(teacher_width=5)
    options = dict(options)
    bias = torch.linspace(-1, 1, 37, dtype=torch.float64) if options.pop("bias", False) else None
    shared = {name: options[name] for name in ("temperature", "vocab_size") if name in options}
    own = {name: options[name] for name in ("scale", "softcap") if name in options}
    inputs = [t.clone().requires_grad_() for t in (h, w) + ((bias,) if bias is not None else ())]
    both = {f"{who}_{name}": value for who in ("student", "teacher") for name, value in own.items()}
    got = ops.linear_kl_div(
        inputs[0],
        inputs[1],
        th,
        tw,
        divergence=kind,
        beta=beta,
        student_bias=inputs[2] if bias is not None else None,
        **both,
        **shared,
    )
    plain = [t.detach().clone().requires_grad_() for t in inputs]
    z_s = logits(plain[0], plain[1], bias=plain[2] if bias is not None else None, **own, **shared)
    wanted = divergence(z_s, logits(th, tw, **own, **shared), kind, beta).mean()
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    for a, b in zip(torch.autograd.grad(got * 3, inputs), torch.autograd.grad(wanted * 3, plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)
    if "vocab_size" in options:
        assert not torch.autograd.grad(ops.linear_kl_div(inputs[0], inputs[1], th, tw, vocab_size=29), inputs[1])[0][
            29:
        ].any(), "padding gets no gradient"


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_gradcheck(kind):
    h, w, th, tw = draw(4, 7, 3)
    h.requires_grad_(), w.requires_grad_()
    function = lambda h, w: ops.linear_kl_div(h, w, th, tw, divergence=kind, beta=0.3, student_softcap=3.0)  # noqa: E731
    assert torch.autograd.gradcheck(function, (h, w)) and torch.autograd.gradgradcheck(function, (h, w))
    labels, index = torch.tensor([0, 3, -100, 6]), torch.tensor([[0, 2], [1, -1], [6, 3], [4, 5]])
    logprobs = logits(th, tw).log_softmax(-1).gather(-1, index.clamp_min(0))
    for function in (
        lambda h, w: ops.linear_cross_entropy(h, w, labels, softcap=2.0),
        lambda h, w: ops.linear_uniform_kl(h, w, softcap=2.0),
        lambda h, w: ops.linear_lse(h, w, softcap=2.0).sum(),
        lambda h, w: ops.linear_sparse_kl_div(h, w, index, logprobs),
        lambda h, w: ops.linear_sparse_kl_div(h, w, index, logprobs, tail="renormalize"),
    ):
        assert torch.autograd.gradcheck(function, (h, w))


def test_cross_entropy_uniform_kl_and_lse():
    h, w, _, _ = draw()
    labels = torch.arange(9) * 4
    labels[2] = -100
    z = logits(h, w, softcap=3.0, scale=0.7, temperature=1.3)
    options = {"softcap": 3.0, "scale": 0.7, "temperature": 1.3}
    torch.testing.assert_close(ops.linear_cross_entropy(h, w, labels, **options), F.cross_entropy(z, labels))
    torch.testing.assert_close(ops.linear_lse(h, w, **options), z.logsumexp(-1))
    uniform = torch.full_like(z, 1 / 37)
    torch.testing.assert_close(
        ops.linear_uniform_kl(h, w, **options), (uniform * (uniform.log() - z.log_softmax(-1))).sum(-1).mean()
    )


def test_sparse_is_dense_when_everything_is_known():
    h, w, th, tw = draw()
    log_t = logits(th, tw).log_softmax(-1)
    index = torch.arange(37).expand(9, 37)
    wanted = divergence(logits(h, w), logits(th, tw), "forward").mean()
    for tail in ("bucket", "renormalize"):
        torch.testing.assert_close(ops.linear_sparse_kl_div(h, w, index, log_t, tail=tail), wanted)
    torch.testing.assert_close(ops.sparse_kl_div(logits(h, w), index, log_t), wanted)


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
def test_sparse_against_the_formula(tail):
    h, w, th, tw = draw(spread=3.0)
    values, index = logits(th, tw).log_softmax(-1).topk(5)
    index[3, 4], index[4, 1:] = -1, -1
    z = logits(h, w).log_softmax(-1)
    wanted = []
    for row in range(9):
        keep = index[row] >= 0
        p, q = values[row][keep].exp(), z[row][index[row][keep]].exp()
        if tail == "renormalize":
            p, q = p / p.sum(), q / q.sum()
        else:
            p, q = torch.cat([p, 1 - p.sum(keepdim=True, dim=0)]), torch.cat([q, 1 - q.sum(keepdim=True, dim=0)])
        wanted.append((p * (p / q).log()).sum())
    got = ops.linear_sparse_kl_div(h, w, index, values, tail=tail, reduction="none")
    torch.testing.assert_close(got, torch.stack(wanted), rtol=1e-9, atol=1e-12)


def relative(a, b):
    return float((a.double() - b).norm() / b.norm())


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, None), (torch.bfloat16, 0.01), (torch.float16, 0.01)])
@pytest.mark.parametrize("spread", [1.0, 3.0])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_the_gradient_stays_right_as_the_student_approaches_the_teacher(dtype, bound, spread, softcap):
    """The property of the difference form: the gradient's relative error does not grow as KL goes to 0."""
    generator = torch.Generator().manual_seed(5)
    rows, vocabulary, width = 24, 2048, 64
    weight = torch.randn(vocabulary, width, generator=generator) / width**0.5
    teacher = (torch.randn(rows, width, generator=generator) * spread).to(dtype)
    step = torch.randn(rows, width, generator=generator) * spread
    weight = weight.to(dtype)
    seen = []
    for size in (2.0, 0.6, 0.2, 0.06, 0.02, 0.006, 0.003):
        hidden = (teacher.float() + size * step).to(dtype)
        inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        options = {"student_softcap": softcap, "teacher_softcap": softcap}
        got = ops.linear_kl_div(*inputs, teacher, weight, **options)
        exact = [t.detach().double().requires_grad_() for t in inputs]
        wanted = ops_free_kl(*exact, teacher.double(), weight.double(), softcap)
        kl = wanted.item()
        if kl < 5e-7:
            continue
        seen.append(kl)
        assert float(got) >= 0 and abs(float(got) - kl) < 1e-3 * kl
        limit = bound or (1e-4 if kl >= 1e-3 else 3e-3)
        # The scale of mixed-precision training, a power of two: without it float16's own range ends first.
        for a, b in zip(torch.autograd.grad(got * 65536, inputs), torch.autograd.grad(wanted * 65536, exact), strict=True):
            assert relative(a, b) < limit, (kl, relative(a, b))
    assert max(seen) > 0.3 and min(seen) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_the_gradient_stays_right_on_hidden_states_of_a_trained_model(kind, dtype, trained):
    hidden, weight, step = (t.to(dtype) for t in trained)
    step, seen = trained[2] * trained[0].norm() / trained[2].norm(), []
    for size in (2.0, 0.1, 0.004):
        inputs = [(hidden.float() + size * step).to(dtype).requires_grad_(), weight.clone().requires_grad_()]
        exact = [t.detach().double().requires_grad_() for t in inputs]
        with backend("reference"):
            got = ops.linear_kl_div(*inputs, hidden, weight, divergence=kind, student_softcap=30.0, teacher_softcap=30.0)
        wanted = divergence(logits(*exact, softcap=30.0), logits(hidden, weight, softcap=30.0), kind).mean()
        kl = wanted.item()
        seen.append(kl)
        value = float(got.detach())
        assert value >= 0 and abs(value - kl) < 1e-3 * kl
        limit = 0.01 if dtype == torch.bfloat16 else 1e-4 if kl >= 1e-3 else 3e-3
        for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(wanted, exact), strict=True):
            assert relative(a, b) < limit, (kl, relative(a, b))
    assert max(seen) > 0.1 and min(seen) < (1e-5 if dtype == torch.float32 else 1e-4), seen


def ops_free_kl(h, w, th, tw, softcap):
    return divergence(logits(h, w, softcap=softcap), logits(th, tw, softcap=softcap), "forward").mean()


def test_no_worse_than_torch_in_the_same_dtype():
    for dtype in (torch.float32, torch.bfloat16):
        h, w, th, tw = draw(32, 1000, 48, dtype, spread=3.0)
        exact = float(ops_free_kl(h, w, th, tw, None))
        torch_own = F.kl_div((h @ w.T).log_softmax(-1), (th @ tw.T).log_softmax(-1), log_target=True, reduction="batchmean")
        assert (
            abs(float(ops.linear_kl_div(h, w, th, tw)) - exact)
            <= abs(float(torch_own) - exact) + probability_error(h, w) * exact
        )


def test_masked_tokens_have_no_influence():
    h, w, th, tw = draw(8, 11, 4)
    mask = torch.tensor([1, 0, 1, 1, 0, 0, 1, 0]).bool()
    dirty, dirty_t = h.clone(), th.clone()
    dirty[~mask], dirty_t[~mask] = torch.nan, torch.inf
    dirty.requires_grad_()
    for divergence_kind in ("forward", "reverse", "jsd"):
        got = ops.linear_kl_div(dirty, w, dirty_t, tw, mask=mask, divergence=divergence_kind)
        wanted = ops.linear_kl_div(h[mask], w, th[mask], tw, divergence=divergence_kind)
        torch.testing.assert_close(got, wanted)
        (gradient,) = torch.autograd.grad(got, dirty)
        assert not gradient[~mask].any() and gradient[mask].any()
    per_token = ops.linear_kl_div(dirty, w, dirty_t, tw, mask=mask, reduction="none")
    assert not per_token[~mask].any() and (per_token[mask] > 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_masked_is_zero(reduction):
    h, w, th, tw = draw(5, 11, 4)
    h.requires_grad_(), w.requires_grad_()
    mask = torch.zeros(5, dtype=torch.bool)
    for loss in (
        ops.linear_kl_div(h, w, th, tw, mask=mask, reduction=reduction),
        ops.linear_uniform_kl(h, w, mask=mask, reduction=reduction),
        ops.linear_cross_entropy(h, w, torch.full((5,), -100), reduction=reduction),
    ):
        gradients = torch.autograd.grad(loss.sum(), (h, w))
        assert not loss.any() and not any(g.any() for g in gradients)


def test_reductions_weights_and_normalizers():
    h, w, th, tw = draw(6, 11, 4)
    mask, weight = torch.tensor([1, 1, 0, 1, 1, 1]).bool(), torch.linspace(0.1, 2, 6, dtype=torch.float64)
    rows = divergence(logits(h, w), logits(th, tw), "forward")
    call = lambda **k: ops.linear_kl_div(h, w, th, tw, mask=mask, token_weight=weight, **k)  # noqa: E731
    torch.testing.assert_close(call(reduction="none"), rows * weight * mask)
    torch.testing.assert_close(call(reduction="sum"), (rows * weight)[mask].sum())
    torch.testing.assert_close(call(), (rows * weight)[mask].sum() / 5)
    torch.testing.assert_close(call(normalizer=40.0), (rows * weight)[mask].sum() / 40)
    torch.testing.assert_close(call(normalizer=torch.tensor(40.0)), (rows * weight)[mask].sum() / 40)
    shaped = ops.linear_kl_div(h.view(2, 3, 4), w, th.view(2, 3, 4), tw, reduction="none")
    torch.testing.assert_close(shaped, rows.view(2, 3))


def test_labels_ride_along_on_their_own_tokens():
    h, w, th, tw = draw(6, 11, 4)
    mask, labels = torch.tensor([1, 1, 1, 0, 0, 0]).bool(), torch.tensor([-100, 4, 5, 6, 7, -100])
    kl = divergence(logits(h, w), logits(th, tw), "forward")[mask].mean()
    got = ops.linear_kl_div(h, w, th, tw, mask=mask, labels=labels, label_weight=0.7)
    torch.testing.assert_close(got, kl + 0.7 * F.cross_entropy(logits(h, w), labels))


def test_statistics_and_a_cached_lse():
    h, w, th, tw = draw(6, 11, 4)
    mask = torch.tensor([1, 1, 0, 1, 1, 1]).bool()
    loss, stats = ops.linear_kl_div(h, w, th, tw, mask=mask, teacher_softcap=3.0, return_stats=True)
    z_s, z_t = logits(h, w), logits(th, tw, softcap=3.0)
    torch.testing.assert_close(stats.lse_s, z_s.logsumexp(-1) * mask)
    torch.testing.assert_close(stats.lse_t, z_t.logsumexp(-1) * mask)
    torch.testing.assert_close(stats.teacher_entropy, torch.distributions.Categorical(logits=z_t).entropy() * mask)
    torch.testing.assert_close(stats.top1_agreement, ((z_s.argmax(-1) == z_t.argmax(-1)) & mask).double())
    lse = ops.linear_lse(th, tw, softcap=3.0)
    torch.testing.assert_close(ops.linear_kl_div(h, w, th, tw, mask=mask, teacher_softcap=3.0, teacher_lse=lse), loss)
    assert not any(value.requires_grad for value in stats)


def test_a_count_above_the_bound_is_nan():
    h, w, th, tw = draw(6, 11, 4)
    assert ops.linear_kl_div(h, w, th, tw, max_counted=5).isnan()
    assert ops.linear_kl_div(h, w, th, tw, max_counted=6).isfinite()


@pytest.mark.parametrize("workspace", [1, 4000, 20000])
def test_a_bounded_workspace_changes_nothing(workspace):
    h, w, th, tw = draw(13, 31, 5)
    inputs = [h.requires_grad_(), w.requires_grad_()]
    labels = torch.arange(13)
    for call in (
        lambda **k: ops.linear_kl_div(*inputs, th, tw, labels=labels, label_weight=0.2, **k),
        lambda **k: ops.linear_cross_entropy(*inputs, labels, **k),
        lambda **k: ops.linear_uniform_kl(*inputs, **k),
    ):
        whole, chunked = call(), call(workspace_bytes=workspace)
        torch.testing.assert_close(whole, chunked)
        for a, b in zip(torch.autograd.grad(whole, inputs), torch.autograd.grad(chunked, inputs), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_extreme_logits_stay_finite(kind, size):
    generator = torch.Generator().manual_seed(1)
    z_s, z_t = (torch.randn(6, 50, generator=generator) * size for _ in range(2))
    z_s.requires_grad_()
    loss = ops.kl_div(z_s, z_t, divergence=kind, beta=0.4)
    (gradient,) = torch.autograd.grad(loss, z_s)
    assert loss.isfinite() and loss >= 0 and gradient.isfinite().all()
    wanted = divergence(z_s.detach().double(), z_t.double(), kind, 0.4)
    if kind != "jsd":  # the formula itself takes log(0) there
        # Logits themselves are exact; differences of two err by a rounding of their size, 50 exponentials by their sum's.
        rounded = gamma(50 + EXPONENTIAL) * 4 * float(torch.maximum(z_s.abs(), z_t.abs()).max())
        assert abs(float(loss) - float(wanted.mean())) <= rounded
    else:
        assert loss <= math.log(2) * (1 + gamma(50 + EXPONENTIAL))


def test_float16_gradients_survive_a_loss_scale():
    h, w, _, _ = draw(16, 300, 8, torch.float16)
    hidden, weight = h.clone().requires_grad_(), w.clone().requires_grad_()
    loss = ops.linear_kl_div(hidden, weight, (h + 2e-3).half(), w)
    gradients = torch.autograd.grad(loss * 65536, (hidden, weight))
    exact = [t.double().requires_grad_() for t in (h, w)]
    wanted = torch.autograd.grad(ops_free_kl(*exact, (h + 2e-3).half(), w, None) * 65536, exact)
    assert all(g.any() and relative(g, e) < 0.01 for g, e in zip(gradients, wanted, strict=True))


def test_tied_heads_non_contiguous_and_empty_inputs():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(13, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[1, 2, 3]])
    hidden = F.embedding(ids, weight)
    loss = ops.linear_cross_entropy(hidden, weight, ids)
    (gradient,) = torch.autograd.grad(loss, weight)
    (wanted,) = torch.autograd.grad(F.cross_entropy((F.embedding(ids, weight) @ weight.T)[0], ids[0]), weight)
    torch.testing.assert_close(gradient, wanted)
    h, w, th, tw = draw(8, 13, 6)
    strided = torch.stack([h, h], -1)[..., 0]
    transposed = w.T.contiguous().T
    assert not strided.is_contiguous() and not transposed.is_contiguous()
    torch.testing.assert_close(ops.linear_kl_div(strided, transposed, th, tw), ops.linear_kl_div(h, w, th, tw))
    assert ops.linear_kl_div(h[:0], w, th[:0], tw) == 0
    assert ops.linear_kl_div(h[:1], w, th[:1], tw, reduction="none").shape == (1,)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 9),
    vocabulary=st.sampled_from([2, 3, 17, 97]),
    width=st.integers(1, 9),
    spread=st.sampled_from([1e-3, 1.0, 30.0]),
    seed=st.integers(0, 99),
    masked=st.floats(0, 1),
)
def test_any_shape(rows, vocabulary, width, spread, seed, masked):
    h, w, th, tw = draw(rows, vocabulary, width, seed=seed, spread=spread)
    mask = torch.rand(rows, generator=torch.Generator().manual_seed(seed)) >= masked
    got = ops.linear_kl_div(h, w, th, tw, mask=mask)
    wanted = divergence(logits(h, w), logits(th, tw), "forward")[mask].sum() / max(int(mask.sum()), 1)
    torch.testing.assert_close(got, wanted, rtol=1e-7, atol=1e-10)
    assert got >= 0
