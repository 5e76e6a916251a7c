"""The C++ losses against float64 formulas that share no code with them, on inputs drawn to be hard."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import EXPONENTIAL, assert_as_exact_as, gamma, probability_error, relative
from undo_kernels import cpu, recorded
from vocab_losses import ROWS, VOCABULARY, assert_as_exact_as_torch, divergence, draw, gradients, logits, values

from undo_core import ops

pytestmark = [
    pytest.mark.skipif(cpu.vocab_loss.kernels is None, reason="no C++ compiler was here when undo-core was installed"),
    pytest.mark.usefixtures("small_tiles", "ran_in_cpp"),
]


OPTIONS = [
    {},
    {"softcap": 2.5, "bias": True},
    {"scale": 0.3, "temperature": 1.7, "bias": True},
    {"scale": 1.5, "softcap": 4.0, "temperature": 0.6, "vocab_size": 2050},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("plan", ["chunk", "recompute"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd", "uniform", "cross_entropy", "lse"])
def test_every_target_with_every_option(kind, reduction, plan, options):
    h, w, th, tw = draw()
    generator = torch.Generator().manual_seed(9)
    bias = torch.randn(VOCABULARY, generator=generator)
    options = dict(options)
    size = options.get("vocab_size", VOCABULARY)
    inputs = [h, w] + ([bias] if options.pop("bias", False) else [])
    mask = torch.rand(ROWS, generator=generator) < 0.7
    labels = torch.randint(0, size, (ROWS,), generator=generator)
    labels[:4] = torch.tensor([0, 1023, 1024, size - 1])  # either side of a tile's edge
    weight = torch.rand(ROWS, generator=generator) + 0.5
    seeds = torch.rand(ROWS, generator=generator) if reduction == "none" else None
    count = int(mask.sum())

    def wanted(h, w, bias=None):
        z = logits(h, w, bias=bias, **options)
        if kind == "lse":
            rows = z.logsumexp(-1)
        elif kind == "cross_entropy":
            rows = F.cross_entropy(z, labels, reduction="none") * weight * mask
        else:
            own = {name: value for name, value in options.items() if name in ("temperature", "vocab_size")}
            rows = divergence(z, logits(th, tw, softcap=3.0, **own), kind, 0.3) * weight * mask
        return rows if reduction == "none" else rows.sum() / count

    def got(h, w, bias=None):
        if kind == "lse":
            rows = ops.linear_lse(h, w, bias=bias, plan=plan, **options)
            return rows if reduction == "none" else rows.sum() / count
        shared = {"mask": mask, "token_weight": weight, "reduction": reduction, "plan": plan}
        if kind == "cross_entropy":
            return ops.linear_cross_entropy(h, w, labels, bias=bias, **shared, **options)
        if kind == "uniform":
            return ops.linear_uniform_kl(h, w, bias=bias, **shared, **options)
        own = {f"student_{name}": options[name] for name in ("scale", "softcap") if name in options}
        both = {name: options[name] for name in ("temperature", "vocab_size") if name in options}
        return ops.linear_kl_div(
            h, w, th, tw, student_bias=bias, divergence=kind, beta=0.3, teacher_softcap=3.0, **shared, **own, **both
        )

    with recorded() as calls:
        _, _, *heads = assert_as_exact_as_torch(got, wanted, inputs, seeds)
    assert {(call.backend, call.plan) for call in calls} <= {("cpu", plan), ("cpu", "one pass")}
    assert all(not gradient[size:].any() for gradient in heads), "padding gets no gradient"


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("spread", [0.02, 1.0, 8.0])
def test_every_instruction_set(instruction_set, kind, spread):
    h, w, _, _ = draw(spread=spread)
    th = h + spread * torch.randn(h.shape, generator=torch.Generator().manual_seed(3)) * 0.3
    fixed = {"student_softcap": 6.0, "teacher_softcap": 6.0, "divergence": kind, "beta": 0.8, "plan": "chunk"}
    with recorded() as calls:
        assert_as_exact_as_torch(
            lambda student, weight: ops.linear_kl_div(student, weight, th, w, **fixed),
            lambda student, weight: divergence(
                logits(student, weight, softcap=6.0), logits(th, w, softcap=6.0), kind, 0.8
            ).mean(),
            [h, w],
        )
        stats = ops.linear_kl_div(h, w, th, w, return_stats=True, **fixed)[1]
    assert {(call.backend, call.form) for call in calls} == {("cpu", instruction_set)}
    z_s, z_t = (logits(hidden, w, softcap=6.0) for hidden in (h, th))
    plain = torch.distributions.Categorical(logits=6 * torch.tanh((th @ w.T) / 6)).entropy()
    exact = torch.distributions.Categorical(logits=z_t).entropy()
    assert_as_exact_as(stats.teacher_entropy, plain, exact, probability_error(th, w))
    # where the two best logits are closer than their rounding, either may be the first
    gaps = torch.stack([rows.topk(2).values.diff(dim=-1).abs().squeeze(-1) for rows in (z_s, z_t)])
    sure = gaps.amin(0) > 2 * probability_error(h, w)
    assert sure.sum() > ROWS / 2
    assert torch.equal(stats.top1_agreement.bool()[sure], (z_s.argmax(-1) == z_t.argmax(-1))[sure])


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("plan", ["chunk", "recompute"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_sparse_teachers(tail, plan, reduction):
    h, w, th, tw = draw(spread=2.0)
    known, index = logits(th, tw).log_softmax(-1).topk(5)
    known = known.float()
    index[3, 4], index[4, 1:] = -1, -1
    mask = torch.arange(ROWS) != 2
    index[2] = 0  # a row that does not count may hold anything
    seeds = torch.rand(ROWS, generator=torch.Generator().manual_seed(1)) if reduction == "none" else None

    def wanted(h, w):
        z = logits(h, w, softcap=5.0).log_softmax(-1)
        rows = []
        for row in range(ROWS):
            keep = index[row] >= 0
            p, q = known[row][keep].to(z.dtype).exp(), z[row][index[row][keep]].exp()
            if tail == "renormalize":
                p, q = p / p.sum(), q / q.sum()
            else:
                p, q = torch.cat([p, 1 - p.sum(keepdim=True, dim=0)]), torch.cat([q, 1 - q.sum(keepdim=True, dim=0)])
            rows.append((p * (p / q).log()).sum() * mask[row])
        rows = torch.stack(rows)
        return rows if reduction == "none" else rows.sum() / (ROWS - 1)

    options = {"tail": tail, "mask": mask, "softcap": 5.0, "plan": plan, "reduction": reduction}
    assert_as_exact_as_torch(lambda h, w: ops.linear_sparse_kl_div(h, w, index, known, **options), wanted, [h, w], seeds)


def test_labels_ride_along_on_the_same_products():
    h, w, th, tw = draw()
    mask, labels = torch.arange(ROWS) < 30, torch.randint(0, VOCABULARY, (ROWS,), generator=torch.Generator().manual_seed(2))
    labels[::5] = -100

    def wanted(h, w):
        z = logits(h, w)
        return divergence(z, logits(th, tw), "forward")[mask].mean() + 0.7 * F.cross_entropy(z, labels)

    options = {"mask": mask, "labels": labels, "label_weight": 0.7, "plan": "chunk"}
    assert_as_exact_as_torch(lambda h, w: ops.linear_kl_div(h, w, th, tw, **options), wanted, [h, w])


def test_masked_tokens_have_no_influence():
    h, w, th, tw = draw(rows=20)
    mask = torch.rand(20, generator=torch.Generator().manual_seed(1)) < 0.5
    dirty, dirty_t = h.clone(), th.clone()
    dirty[~mask], dirty_t[~mask] = torch.nan, torch.inf
    for kind in ("forward", "reverse", "jsd"):
        inputs = [dirty.clone().requires_grad_(), w.clone().requires_grad_()]
        got = ops.linear_kl_div(*inputs, dirty_t, tw, mask=mask, divergence=kind, plan="chunk")
        clean = [h[mask].clone().requires_grad_(), w.clone().requires_grad_()]
        wanted = ops.linear_kl_div(*clean, th[mask], tw, divergence=kind, plan="chunk")
        d_hidden, d_weight = gradients(got, inputs)
        d_clean, d_weight_clean = gradients(wanted, clean)
        assert not d_hidden[~mask].any()
        # the same rows are compacted from other places: only the order of the products' sums may differ
        floor = 2 * probability_error(h, w)
        for a, b in ((got, wanted), (d_hidden[mask], d_clean), (d_weight, d_weight_clean)):
            assert relative(a.detach(), b.detach()) <= floor


def test_a_count_above_the_bound_is_nan_and_a_true_bound_changes_nothing():
    h, w, th, tw = draw(rows=6)
    mask = torch.tensor([1, 1, 0, 1, 1, 1]).bool()
    assert ops.linear_kl_div(h, w, th, tw, mask=mask, max_counted=4, plan="chunk").isnan()
    bounded, free = (ops.linear_kl_div(h, w, th, tw, mask=mask, max_counted=n, plan="chunk") for n in (5, None))
    assert torch.equal(bounded, free)


def logits_pair(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 5, 4099, generator=generator) for _ in range(2)]


def test_given_logits_and_their_gradient_in_place():
    z, z_t = logits_pair()
    mask = torch.rand(3, 5, generator=torch.Generator().manual_seed(1)) < 0.7

    def wanted(z):
        return divergence(z[..., :4000] / 1.3, z_t.to(z.dtype)[..., :4000] / 1.3, "forward")[mask].mean()

    (loss_plain, d_plain), (loss_exact, d_exact) = values(wanted, [z]), values(wanted, [z.double()])
    floor = gamma(128 + 3 * EXPONENTIAL + int(2 * z.abs().max()))  # sums of a block, and the logits under an exponential
    for inplace, plan in ((False, "chunk"), (False, "recompute"), (True, "chunk")):
        base = z.clone().requires_grad_()
        produced = base * 1.0
        loss = ops.kl_div(produced, z_t, mask=mask, temperature=1.3, vocab_size=4000, inplace_grad=inplace, plan=plan)
        assert_as_exact_as(loss, loss_plain, loss_exact, floor)
        loss.backward()
        assert_as_exact_as(base.grad, d_plain, d_exact, floor)
        assert torch.equal(produced.detach(), base.grad) == inplace, "overwritten only with leave"
        assert not base.grad[~mask].any() and not base.grad[..., 4000:].any()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.sampled_from([0, 1, 2, 15, 16, 17, 33]),
    vocabulary=st.sampled_from([1, 2, 127, 128, 129, 1023, 1025, 2049]),
    width=st.integers(1, 9),
    spread=st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
    seed=st.integers(0, 99),
    masked=st.floats(0, 1),
    plan=st.sampled_from(["chunk", "recompute"]),
    strided=st.booleans(),
    kind=st.sampled_from(["forward", "reverse", "jsd", "uniform"]),
)
def test_any_shape(rows, vocabulary, width, spread, seed, masked, plan, strided, kind):
    h, w, th, tw = draw(rows, vocabulary, width, width, spread, seed)
    mask = torch.rand(rows, generator=torch.Generator().manual_seed(seed)) >= masked
    if strided:
        h, w = torch.stack([h, h], -1)[..., 0], w.T.contiguous().T
    inputs = [h.requires_grad_(), w.requires_grad_()]
    if kind == "uniform":
        got = ops.linear_uniform_kl(*inputs, mask=mask, softcap=1e4, plan=plan)
    else:
        got = ops.linear_kl_div(
            *inputs, th, tw, mask=mask, divergence=kind, plan=plan, student_softcap=1e4, teacher_softcap=1e4
        )
    z_s, z_t = (1e4 * torch.tanh((a.double() @ b.double().T).detach() / 1e4) for a, b in ((h, w), (th, tw)))
    wanted = divergence(z_s, z_t, kind)[mask].sum() / max(int(mask.sum()), 1)
    # A logarithm of a probability errs by this much at most. A loss is a mean of products of probabilities and of differences of
    # such logarithms: it errs by twice that, and relatively by what the probabilities do.
    logarithm = max(probability_error(a, b) for a, b in ((h, w), (th, tw))) if rows else 0.0
    assert abs(float(got.detach()) - float(wanted)) <= 2 * logarithm + math.expm1(min(2 * logarithm, 1.0)) * float(wanted)
    assert got >= 0
    assert all(g.isfinite().all() for g in gradients(got, inputs))


def test_a_vocabulary_of_256000_and_a_prime_one():
    for vocabulary in (256_000, 100_003):
        h, w, th, tw = draw(rows=6, vocabulary=vocabulary, width=16, teacher_width=16)
        with recorded() as calls:
            assert_as_exact_as_torch(
                lambda h, w, th=th, tw=tw: ops.linear_kl_div(h, w, th, tw),
                lambda h, w, th=th, tw=tw: divergence(logits(h, w), logits(th, tw), "forward").mean(),
                [h, w],
            )
        assert [(call.backend, call.vocabulary) for call in calls] == [("cpu", vocabulary)]
