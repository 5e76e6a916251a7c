"""The C++ losses against float64 formulas that share no code with them, on inputs drawn to be hard."""

import math
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from undo_kernels import cpu
from undo_kernels import plan as plan_module
from undo_kernels.plan import cpu_plan
from undo_kernels.problem import Problem
from undo_kernels.projection import Projection

from undo_core import ops

pytestmark = pytest.mark.skipif(cpu.losses._cpu is None, reason="no C++ compiler was here when undo-core was installed")

ROWS, VOCABULARY, WIDTH, TEACHER_WIDTH = 37, 2311, 12, 7  # more than two tiles, and prime


@pytest.fixture(scope="module", autouse=True)
def small_tiles():
    """Small problems of several tiles; the default's tile has thousands of rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "_BLOCK_V", 1024)
        yield


def logits(hidden, weight, scale=1.0, softcap=None, bias=None, temperature=1.0, vocab_size=None):
    z = hidden.double() @ weight.double().T
    z = (z if bias is None else z + bias.double()) * scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    return (z / temperature)[..., :vocab_size]


def divergence(z_s, z_t, kind, beta=0.5):
    s, t = z_s.log_softmax(-1), z_t.log_softmax(-1)
    if kind == "uniform":
        t = torch.full_like(s, -math.log(s.shape[-1]))
    if kind == "reverse":
        return (s.exp() * (s - t)).sum(-1)
    if kind == "jsd":
        m = torch.logaddexp(t + math.log(beta), s + math.log1p(-beta))
        return beta * (t.exp() * (t - m)).sum(-1) + (1 - beta) * (s.exp() * (s - m)).sum(-1)
    return (t.exp() * (t - s)).sum(-1)


def relative(got, wanted):
    return float((got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-300))


def draw(rows=ROWS, vocabulary=VOCABULARY, width=WIDTH, teacher_width=TEACHER_WIDTH, spread=1.0, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    tensors = [make(rows, width) * spread, make(vocabulary, width) / width**0.5]
    tensors += [make(rows, teacher_width) * spread, make(vocabulary, teacher_width) / teacher_width**0.5]
    return [tensor.to(dtype) for tensor in tensors]


def gradients(loss, inputs, seeds=None):
    return torch.autograd.grad(loss if loss.ndim == 0 else (loss * seeds).sum(), inputs)


@pytest.fixture(params=["avx512", "avx2", "plain"])
def instruction_set(request, monkeypatch):
    try:
        cpu.losses._cpu.instruction_set(request.param)
    except ValueError:
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setattr(cpu.losses, "INSTRUCTION_SET", request.param)


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

    single = [t.clone().requires_grad_() for t in inputs]
    exact = [t.double().requires_grad_() for t in inputs]
    loss, loss_exact = got(*single), wanted(*exact)
    assert relative(loss, loss_exact) < 1e-6
    for a, b in zip(gradients(loss, single, seeds), gradients(loss_exact, exact, seeds), strict=True):
        assert relative(a, b) < 5e-6
        if a.shape[0] == VOCABULARY:
            assert not a[size:].any(), "padding gets no gradient"


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("spread", [0.02, 1.0, 8.0])
def test_every_instruction_set(kind, spread):
    h, w, _, _ = draw(spread=spread)
    th = h + spread * torch.randn(h.shape, generator=torch.Generator().manual_seed(3)) * 0.3
    inputs, exact = (
        [h.clone().requires_grad_(), w.clone().requires_grad_()],
        [h.double().requires_grad_(), w.double().requires_grad_()],
    )
    caps = {"student_softcap": 6.0, "teacher_softcap": 6.0}
    loss, stats = ops.linear_kl_div(*inputs, th, w, divergence=kind, beta=0.8, return_stats=True, plan="chunk", **caps)
    z_t = logits(th, w, softcap=6.0)
    wanted = divergence(logits(*exact, softcap=6.0), z_t, kind, 0.8).mean()
    assert relative(loss, wanted) < 1e-5
    for a, b in zip(gradients(loss, inputs), gradients(wanted, exact), strict=True):
        assert relative(a, b) < 5e-5
    torch.testing.assert_close(
        stats.teacher_entropy.double(), torch.distributions.Categorical(logits=z_t).entropy(), rtol=1e-5, atol=1e-5
    )
    z_s = logits(*exact, softcap=6.0)
    assert torch.equal(stats.top1_agreement.bool(), z_s.argmax(-1) == z_t.argmax(-1))


@pytest.mark.parametrize("tail", ["bucket", "renormalize"])
@pytest.mark.parametrize("plan", ["chunk", "recompute"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_sparse_teachers(tail, plan, reduction):
    h, w, th, tw = draw(spread=2.0)
    values, index = logits(th, tw).log_softmax(-1).topk(5)
    index[3, 4], index[4, 1:] = -1, -1
    mask = torch.arange(ROWS) != 2
    index[2] = 0  # a row that does not count may hold anything
    seeds = torch.rand(ROWS, generator=torch.Generator().manual_seed(1)) if reduction == "none" else None

    def wanted(h, w):
        z = logits(h, w, softcap=5.0).log_softmax(-1)
        rows = []
        for row in range(ROWS):
            keep = index[row] >= 0
            p, q = values[row][keep].exp(), z[row][index[row][keep]].exp()
            if tail == "renormalize":
                p, q = p / p.sum(), q / q.sum()
            else:
                p, q = torch.cat([p, 1 - p.sum(keepdim=True, dim=0)]), torch.cat([q, 1 - q.sum(keepdim=True, dim=0)])
            rows.append((p * (p / q).log()).sum() * mask[row])
        rows = torch.stack(rows)
        return rows if reduction == "none" else rows.sum() / (ROWS - 1)

    inputs, exact = (
        [h.clone().requires_grad_(), w.clone().requires_grad_()],
        [h.double().requires_grad_(), w.double().requires_grad_()],
    )
    got = ops.linear_sparse_kl_div(
        *inputs, index, values.float(), tail=tail, mask=mask, softcap=5.0, plan=plan, reduction=reduction
    )
    loss = wanted(*exact)
    assert relative(got, loss) < 2e-6
    for a, b in zip(gradients(got, inputs, seeds), gradients(loss, exact, seeds), strict=True):
        assert relative(a, b) < 1e-5


def test_labels_ride_along_on_the_same_products():
    h, w, th, tw = draw()
    mask, labels = torch.arange(ROWS) < 30, torch.randint(0, VOCABULARY, (ROWS,), generator=torch.Generator().manual_seed(2))
    labels[::5] = -100
    inputs, exact = (
        [h.clone().requires_grad_(), w.clone().requires_grad_()],
        [h.double().requires_grad_(), w.double().requires_grad_()],
    )
    got = ops.linear_kl_div(*inputs, th, tw, mask=mask, labels=labels, label_weight=0.7, plan="chunk")
    z = logits(*exact)
    wanted = divergence(z, logits(th, tw), "forward")[mask].mean() + 0.7 * F.cross_entropy(z, labels)
    assert relative(got, wanted) < 1e-6
    for a, b in zip(gradients(got, inputs), gradients(wanted, exact), strict=True):
        assert relative(a, b) < 5e-6


@pytest.fixture(scope="module")
def trained():
    """Final hidden states and head of a small language model after some training on a second-order Markov text."""
    from transformers import AutoConfig, AutoModelForCausalLM

    vocabulary = 1024
    config = AutoConfig.for_model(
        "gemma2", vocab_size=vocabulary, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, query_pre_attn_scalar=32, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        table = torch.randint(1, vocabulary, (vocabulary, 4))
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(60):
            ids = torch.randint(1, vocabulary, (16, 33))
            for t in range(1, 33):
                ids[:, t] = table[ids[:, t - 1], torch.randint(0, 4, (16,)) * torch.randint(0, 2, (16,))]
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss < 4.0, "the model has learnt something"
        hidden = model.base_model(input_ids=ids).last_hidden_state.detach().reshape(-1, 64)[:192]
    return hidden, model.lm_head.weight.detach(), torch.randn(192, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("dtype", "tiles"),
    [(torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, True)],
    ids=["float32", "bfloat16", "bfloat16 without AMX", "float16"],
)
@pytest.mark.parametrize("source", ["random 1", "random 3", "trained"])
@pytest.mark.parametrize("plan", ["chunk", "recompute"])
@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_the_gradient_stays_right_as_the_student_approaches_the_teacher(kind, plan, source, dtype, tiles, trained, monkeypatch):
    """The property of the difference form: the gradient's relative error does not grow as KL goes from 1 to 1e-6."""
    softcap = 30.0
    if not tiles:
        monkeypatch.setattr(cpu.losses, "has_amx", lambda: False)
    if source == "trained":
        teacher, weight, step = trained
    else:
        generator = torch.Generator().manual_seed(5)
        teacher = torch.randn(96, 64, generator=generator) * float(source.split()[1])
        weight = torch.randn(2311, 64, generator=generator) / 8
        step = torch.randn(96, 64, generator=generator) * float(source.split()[1])
    teacher, weight = teacher.to(dtype), weight.to(dtype)
    z_t, seen = logits(teacher, weight, softcap=softcap), []
    for size in (4.0, 2.0, 1.0, 0.4, 0.1, 0.03, 0.01, 0.003, 0.0015):
        hidden = (teacher.float() + size * step * (teacher.float().norm() / step.norm())).to(dtype)
        inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        exact = [t.detach().double().requires_grad_() for t in inputs]
        options = {"student_softcap": softcap, "teacher_softcap": softcap, "divergence": kind, "plan": plan}
        got = ops.linear_kl_div(*inputs, teacher, weight, **options)
        wanted = divergence(logits(*exact, softcap=softcap), z_t, kind).mean()
        kl = wanted.item()
        if not 5e-7 < kl < 2:
            continue
        seen.append(kl)
        got_value = float(got.detach())
        assert got_value >= 0 and abs(got_value - kl) < 1e-3 * kl
        limit = 0.01 if dtype != torch.float32 else 1e-4 if kl >= 1e-3 else 3e-3
        # float16's own range ends before these gradients do: the loss scale of mixed-precision training
        for a, b in zip(gradients(got * 65536, inputs), gradients(wanted * 65536, exact), strict=True):
            assert relative(a, b) < limit, (kl, relative(a, b))
    assert max(seen) > 0.2 and min(seen) < 1e-4, seen


def test_no_worse_than_torch_in_the_same_dtype():
    for dtype in (torch.float32, torch.bfloat16):
        h, w, th, tw = draw(spread=3.0, dtype=dtype)
        th = h + (torch.randn(h.shape, generator=torch.Generator().manual_seed(4)) * 0.1).to(dtype)
        exact = [t.double().requires_grad_() for t in (h, w)]
        wanted = gradients(divergence(logits(*exact), logits(th, w), "forward").mean(), exact)
        errors = []
        for function in (
            lambda h, w: ops.linear_kl_div(h, w, th, w.detach(), plan="chunk"),
            lambda h, w: F.kl_div(
                (h @ w.T).log_softmax(-1), (th @ w.detach().T).log_softmax(-1), log_target=True, reduction="batchmean"
            ),
        ):
            inputs = [h.clone().requires_grad_(), w.clone().requires_grad_()]
            errors.append([relative(a, b) for a, b in zip(gradients(function(*inputs), inputs), wanted, strict=True)])
        assert all(ours <= theirs for ours, theirs in zip(*errors, strict=True)), errors


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


@pytest.mark.parametrize("tiles", [True, False], ids=["AMX", "without AMX"])
def test_a_sixteen_bit_head_with_a_bias(tiles, monkeypatch):
    if not tiles:
        monkeypatch.setattr(cpu.losses, "has_amx", lambda: False)
    h, w, _, _ = draw(rows=20, width=64, dtype=torch.bfloat16)
    bias, labels = torch.zeros(VOCABULARY, dtype=torch.bfloat16), torch.arange(20) * 100
    for plan in ("chunk", "recompute"):
        inputs = [t.clone().requires_grad_() for t in (h, w, bias)]
        exact = [t.double().requires_grad_() for t in (h, w, bias)]
        got = ops.linear_cross_entropy(*inputs[:2], labels, bias=inputs[2], plan=plan)
        wanted = F.cross_entropy(logits(*exact[:2], bias=exact[2]), labels)
        for a, b in zip(gradients(got, inputs), gradients(wanted, exact), strict=True):
            assert a.dtype == torch.bfloat16 and relative(a, b) < 4e-3


@pytest.mark.parametrize("tiles", [True, False], ids=["AMX", "without AMX"])
def test_sixteen_bit_weight_gradients_over_many_chunks(tiles, monkeypatch):
    if not tiles:
        monkeypatch.setattr(cpu.losses, "has_amx", lambda: False)
    h, w, th, tw = draw(rows=400, width=32, teacher_width=32, dtype=torch.bfloat16)
    exact = [t.double().requires_grad_() for t in (h, w)]
    wanted = gradients(divergence(logits(*exact), logits(th, tw), "forward").mean(), exact)
    seen = set()
    for plan, workspace in (("chunk", None), ("chunk", 4_000_000), ("chunk", 1_200_000), ("recompute", 800_000)):
        inputs = [h.clone().requires_grad_(), w.clone().requires_grad_()]
        p = Problem(Projection(h, w), "forward", torch.ones(400), teacher=Projection(th, tw), needs=(True, True, False), plan=plan, workspace_bytes=workspace)  # fmt: skip
        chosen = cpu_plan(p, 400, cpu.losses.has_amx())
        seen.add((chosen.accumulator, -(-400 // chosen.rows_per_chunk) > 1))
        got = gradients(ops.linear_kl_div(*inputs, th, tw, plan=plan, workspace_bytes=workspace), inputs)
        for a, b in zip(got, wanted, strict=True):
            assert a.dtype == torch.bfloat16 and relative(a, b) < 4e-3
    assert seen >= {(False, False), (False, True), (True, True)}


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
        torch.testing.assert_close(got, wanted)
        d_hidden, d_weight = gradients(got, inputs)
        d_clean, d_weight_clean = gradients(wanted, clean)
        assert not d_hidden[~mask].any()
        torch.testing.assert_close(d_hidden[mask], d_clean)
        torch.testing.assert_close(d_weight, d_weight_clean)


@pytest.mark.parametrize("rows", [1, 17, 40])
@pytest.mark.parametrize("vocabulary", [3, 101, 1030])
def test_spoilt_memory_does_not_show(rows, vocabulary):
    """torch's 16-bit product reads its output for some shapes; fresh memory may hold NaN."""
    h, w, th, tw = draw(rows, vocabulary, 32, 32, dtype=torch.bfloat16)
    inputs = [h.requires_grad_(), w.requires_grad_()]
    modes = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    try:
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True  # with NaN
        found = gradients(ops.linear_kl_div(*inputs, th, tw, plan="chunk"), inputs)
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


def test_a_count_above_the_bound_is_nan_and_a_true_bound_changes_nothing():
    h, w, th, tw = draw(rows=6)
    mask = torch.tensor([1, 1, 0, 1, 1, 1]).bool()
    assert ops.linear_kl_div(h, w, th, tw, mask=mask, max_counted=4, plan="chunk").isnan()
    bounded, free = (ops.linear_kl_div(h, w, th, tw, mask=mask, max_counted=n, plan="chunk") for n in (5, None))
    assert torch.equal(bounded, free)


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
    torch.testing.assert_close(loss.detach().double(), wanted, rtol=1e-4, atol=1e-6)


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


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize(("spread", "near"), [(1, 1e-3), (10, 0.1), (10, 1e-5), (30, 1e-3)])
def test_peaked_teachers_that_the_student_agrees_with(kind, spread, near):
    """On given logits: the gap of the log-sum-exps is not the difference of two float32 sums."""
    generator = torch.Generator().manual_seed(2)
    z_s = torch.randn(8, 1500, generator=generator) * spread
    z_t = z_s + torch.randn(8, 1500, generator=generator) * near
    inputs, exact = z_s.clone().requires_grad_(), z_s.double().requires_grad_()
    (got,) = gradients(ops.kl_div(inputs, z_t, divergence=kind, reduction="sum", plan="chunk"), [inputs])
    s, t = exact.log_softmax(-1), z_t.double().log_softmax(-1)
    x = s - t
    if kind == "jsd":
        m = torch.logaddexp(s, t) - math.log(2)
        wanted = 0.5 * s.exp() * ((s - m) - (s.exp() * (s - m)).sum(-1, keepdim=True))
    else:
        wanted = t.exp() * x.expm1() if kind == "forward" else s.exp() * (x - (s.exp() * x).sum(-1, keepdim=True))
    wanted = wanted.detach()
    real = wanted.norm(dim=-1) > 1e-12
    assert real.any() and relative(got[real], wanted[real]) < 2e-4


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
    wanted = divergence(logits(h, w), logits(th, tw), "jsd", beta).mean()
    assert relative(ops.linear_kl_div(h, w, th, tw, divergence="jsd", beta=beta, plan="chunk"), wanted) < 1e-5


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
        torch.testing.assert_close(gradient[:, 0], torch.full((3,), 0.5), rtol=1e-3, atol=0)
    nothing = ops.sparse_kl_div(z, torch.zeros(3, 0, dtype=torch.long), torch.zeros(3, 0), tail=tail, plan=plan)
    assert nothing == 0


def logits_pair(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 5, 4099, generator=generator) for _ in range(2)]


def test_given_logits_and_their_gradient_in_place():
    z, z_t = logits_pair()
    mask = torch.rand(3, 5, generator=torch.Generator().manual_seed(1)) < 0.7
    exact = z.double().requires_grad_()
    wanted = divergence(exact[..., :4000] / 1.3, z_t.double()[..., :4000] / 1.3, "forward")[mask].mean()
    (d_exact,) = gradients(wanted, [exact])
    for inplace, plan in ((False, "chunk"), (False, "recompute"), (True, "chunk")):
        base = z.clone().requires_grad_()
        produced = base * 1.0
        loss = ops.kl_div(produced, z_t, mask=mask, temperature=1.3, vocab_size=4000, inplace_grad=inplace, plan=plan)
        assert relative(loss.detach(), wanted.detach()) < 1e-6
        loss.backward()
        assert relative(base.grad, d_exact) < 5e-6
        assert torch.equal(produced.detach(), base.grad) == inplace, "overwritten only with leave"
        assert not base.grad[~mask].any() and not base.grad[..., 4000:].any()


def test_the_block_filter_reports_what_it_drops():
    h, w, _, _ = draw(rows=64, width=16)
    w = w * torch.where(torch.arange(VOCABULARY) < 2048, 1.0, 1e-3)[:, None]  # the second tile hardly moves
    th = h + 0.05 * torch.randn(h.shape, generator=torch.Generator().manual_seed(2))
    inputs = [h.clone().requires_grad_(), w.clone().requires_grad_()]
    exact = gradients(ops.linear_kl_div(*inputs, th, w, plan="chunk"), inputs)
    loss, stats = ops.linear_kl_div(*inputs, th, w, plan="chunk", filter_below=3e-5, return_stats=True)
    kept = gradients(loss, inputs)
    share, norm = stats.filtered.tolist()
    assert 0 < share < 1 and norm > 0
    bounds = (norm * torch.linalg.matrix_norm(w, 2), norm * torch.linalg.matrix_norm(h, 2))
    for a, b, bound in zip(kept, exact, bounds, strict=True):
        assert 0 < (a - b).norm() <= bound * 1.001
    unfiltered = ops.linear_kl_div(*inputs, th, w, plan="chunk", return_stats=True)[1]
    assert not unfiltered.filtered.any()


@pytest.mark.parametrize("plan", ["chunk", "recompute"])
def test_two_calls_give_the_same_bits(plan):
    h, w, th, tw = draw(rows=300)
    results = []
    for _ in range(2):
        inputs = [h.clone().requires_grad_(), w.clone().requires_grad_()]
        loss = ops.linear_kl_div(*inputs, th, tw, plan=plan)
        results.append((loss.detach(), *gradients(loss, inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


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
    # float32 logits are the op's own: the oracle starts from the same products
    z_s, z_t = (1e4 * torch.tanh((a @ b.T).detach().double() / 1e4) for a, b in ((h, w), (th, tw)))
    wanted = divergence(z_s, z_t, kind)[mask].sum() / max(int(mask.sum()), 1)
    # at 1e4 the products' own rounding, which differs with their order, is 1e-3 of a logit
    torch.testing.assert_close(got.detach().double(), wanted, rtol=2e-3 if spread == 1e4 else 1e-4, atol=1e-6 + 1e-7 * spread)
    assert got >= 0
    assert all(g.isfinite().all() for g in gradients(got, inputs))


def test_a_vocabulary_of_256000_and_a_prime_one():
    for vocabulary in (256_000, 100_003):
        h, w, th, tw = draw(rows=3, vocabulary=vocabulary, width=16, teacher_width=16)
        inputs, exact = (
            [h.requires_grad_(), w.requires_grad_()],
            [h.double().detach().requires_grad_(), w.double().detach().requires_grad_()],
        )
        got = ops.linear_kl_div(*inputs, th, tw)
        wanted = divergence(logits(*exact), logits(th, tw), "forward").mean()
        assert relative(got.detach(), wanted.detach()) < 1e-6
        for a, b in zip(gradients(got, inputs), gradients(wanted, exact), strict=True):
            assert relative(a, b) < 5e-6


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
