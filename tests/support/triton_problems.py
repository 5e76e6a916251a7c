"""Problems for the Triton losses, their oracle in float64 by autograd, and the comparison of the two.

Problems and results are on the CPU; the losses run where Triton runs: on a GPU, or interpreted.
"""

import dataclasses
import math

import torch
from rounding import EXPONENTIAL, assert_as_exact_as, gamma, probability_error
from undo_kernels.problem import Problem
from undo_kernels.projection import GivenLogits, Projection
from undo_kernels.triton import vocab_loss as driver
from undo_kernels.triton.plan import gpu_plan
from undo_kernels.triton.products import Workspace

DEVICE = torch.device("cpu" if driver.INTERPRETED else "cuda")
DENSE = ("forward", "reverse", "jsd")


TARGETS = ("own", "uniform", *DENSE)


SPARSE = ("bucket", "renormalize")


def moved(value, device=DEVICE):
    """A problem, a side or a result with its tensors on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **{name: moved(field, device) for name, field in fields.items()})
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return value._make(moved(field, device) for field in value)
    return value


def vocab_loss(p):
    """The Triton loss of a problem on the CPU."""
    return moved(driver.vocab_loss(moved(p)), torch.device("cpu"))


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
    counted = torch.ones(p.tokens, dtype=torch.bool) if p.counted is None else p.counted
    leaf = {n: getattr(p.student, n) for n in ("hidden", "weight", "bias")}
    leaf = {n: None if t is None else t.detach().to(dtype).requires_grad_() for n, t in leaf.items()}
    hidden = torch.where(counted[:, None], leaf["hidden"], torch.zeros((), dtype=dtype))
    z = oracle_logits(p.student, hidden, leaf["weight"], leaf["bias"])
    log_s = torch.log_softmax(z, -1)
    lse_s = torch.logsumexp(z, -1)
    out = {"lse_s": lse_s}
    divergence = torch.zeros(p.tokens, dtype=dtype)
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
        divergence = torch.stack([_oracle_sparse(p, z, log_s, i) for i in range(p.tokens)]) if p.tokens else divergence
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


def _floor(side):
    """Relative error that float32 may cause in the probabilities of one side; see ``rounding``."""
    if isinstance(side, GivenLogits):
        return (
            gamma(side.vocabulary + 3 * EXPONENTIAL + 1 + int(2 * side.hidden.nan_to_num().abs().max())) if side.tokens else 0.0
        )
    return probability_error(side.hidden.nan_to_num(), side.weight.nan_to_num(), side.vocabulary)


def check(p):
    """Every output against the oracle: twice the error of plain torch, and what rounding may do; gradients of 16 bits within 1 %."""
    want, yardstick = oracle(p), same_dtype(p)
    there = moved(p)
    scratch = Workspace(DEVICE)
    hidden_before = there.student.hidden.clone() if not p.inplace else None
    got = moved(driver.run(there, scratch), torch.device("cpu"))
    if hidden_before is not None:
        assert torch.equal(hidden_before.nan_to_num(7.0), there.student.hidden.nan_to_num(7.0)), "inputs were written to"
    narrow = any(t.dtype != torch.float32 for t in (p.student.hidden, p.student.weight))
    floor = max(_floor(side) for side in (p.student, p.teacher) if side is not None)
    rows = math.sqrt(max(p.tokens, 1))  # norm of logarithms that each err by the floor
    for name in ("divergence", "nll", "lse_s", "lse_t"):
        value = getattr(got, name)
        if value.numel():
            assert_as_exact_as(value, yardstick[name], want[name], floor, name, scale=rows)
    assert (got.divergence >= 0).all()
    weights = float(p.factor.sum()) + (0.0 if p.label_factor is None else float(p.label_factor.sum()))
    assert_as_exact_as(got.total, yardstick["total"], want["total"], floor, "total", scale=weights)
    if p.statistics and p.target in DENSE:
        assert_as_exact_as(got.teacher_entropy, yardstick["entropy"], want["entropy"], floor, "entropy", scale=rows)
        assert torch.equal(got.top1_agreement.double(), want["agreement"])
    for number, name in enumerate(("d_hidden", "d_weight", "d_bias")):
        value = getattr(got, name)
        if not p.needs[number]:
            assert value.numel() == 0 or p.inplace
            continue
        assert torch.isfinite(value).all()
        assert_as_exact_as(value, yardstick[name], want[name], 0.01 if narrow else floor, name)
        if name != "d_hidden":
            assert (value[p.student.vocabulary :] == 0).all()
        elif p.counted is not None:
            assert (value[~p.counted] == 0).all()
    plan = gpu_plan(there)
    assert scratch.peak <= plan.workspace_bytes
    if p.workspace_bytes is not None:
        assert scratch.peak <= p.workspace_bytes
    return got
