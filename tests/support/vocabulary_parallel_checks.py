"""What several processes that share a head check; ``vocabulary_parallel.py`` runs them on a list of backends, losses and options."""

import contextlib
import itertools
import re

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rounding import assert_as_exact_as, probability_error, relative
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils.checkpoint import checkpoint
from undo_kernels import backend, cpu, ops, recorded
from undo_kernels.vocabulary_shard import bytes_exchanged
from vocab_losses import computed_in, divergence, draw, gradients, logit_gradient, logits, near_logits, values

VOCABULARY, WIDTH, TOKENS = 1031, 12, 23  # a prime: no number of processes divides it
KINDS = ("forward", "reverse", "jsd")
CPP, PLAIN = ("cpu", "recompute"), ("reference", "direct")
OPTIONS = (
    {},
    {"bias": True, "softcap": 3.0, "scale": 1.4, "temperature": 0.7},
    {"vocab_size": 700},
)  # 700: ranks without entries


class Processes:
    """This process among those that share a head."""

    def __init__(self, mesh):
        self.mesh = mesh

    def shard(self, full):
        """The part of a tensor on this process, as a DTensor; autograd adds its gradient into the full tensor's."""
        size = -(-full.shape[0] // self.mesh.size())
        first = min(self.mesh.get_local_rank() * size, full.shape[0])
        local = full[first : first + size]
        return DTensor.from_local(local, self.mesh, [Shard(0)], run_check=False, shape=full.shape, stride=full.stride())

    def whole(self, gradient):
        """Sums the parts of a gradient, each of which is 0 outside its own process's entries."""
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


def check(p, op, formula, tensors, sharded, seeds=None, floor=None):
    """Loss and gradients of a sharded op against a formula in float64, by the error of the formula in float32."""
    loss, *grads = values(op, tensors, seeds)
    grads = [p.whole(grad) if number in sharded else grad for number, grad in enumerate(grads)]
    exact = values(formula, [t.double() for t in tensors], seeds)
    with computed_in(torch.float32):
        plain = values(formula, [t.float() for t in tensors], seeds)
    floor = probability_error(*tensors[:2]) if floor is None else floor
    for name, ours, theirs, want in zip(("loss", *map(str, range(len(grads)))), [loss, *grads], plain, exact, strict=True):
        assert_as_exact_as(ours, theirs, want, floor, name)


@contextlib.contextmanager
def on(where, plan):
    """Runs on a backend, and asserts that it ran."""
    with backend(where), recorded() as calls:
        yield
    plans = {(where, plan), (where, "one pass")}  # where nothing is needed after the log-sum-exps
    assert calls and {(call.backend, call.plan) for call in calls} <= plans, calls


def dense(p, where, plan, kind, reduction, options, dtype=torch.float32):
    options = dict(options)
    h, w, th, tw = draw(TOKENS, VOCABULARY, WIDTH, 7, dtype=dtype)
    b = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(3), dtype=dtype) if options.pop("bias", False) else None
    mask = torch.arange(TOKENS) % 5 != 2
    weights = torch.linspace(0.5, 1.5, TOKENS, dtype=dtype)
    seeds = torch.linspace(-1, 1, TOKENS) if reduction == "none" else None
    keep = (mask * weights).double()
    common = {k: v for k, v in options.items() if k in ("temperature", "vocab_size")}
    shaped = {f"{side}_{k}": v for k, v in options.items() if k not in common for side in ("student", "teacher")}

    def reduced(values, count):
        values = values * keep
        return values if reduction == "none" else values.sum() / (count if reduction == "mean" else 1)

    def op(h, w, b=None):
        teacher = {
            "teacher_bias": None if b is None else p.shard(b.detach()),
            "student_bias": None if b is None else p.shard(b),
        }
        return ops.linear_kl_div(
            h, p.shard(w), th, p.shard(tw), mask=mask, token_weight=weights, divergence=kind, beta=0.3, reduction=reduction,
            plan=plan, **teacher, **common, **shaped,
        )  # fmt: skip

    def formula(h, w, b=None):
        z_s = logits(h, w, bias=b, **options)
        z_t = logits(th, tw, bias=None if b is None else b.detach(), **options)
        return reduced(divergence(z_s, z_t, kind, 0.3), mask.sum())

    with on(where, plan):
        check(p, op, formula, [h, w] if b is None else [h, w, b], {1, 2}, seeds)


def single(p, where, plan, name, reduction):
    """The losses without a teacher, and those of a teacher known at a few entries."""
    h, w, th, tw = draw(TOKENS, VOCABULARY, WIDTH, 7)
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(2))
    labels[3] = -100
    seeds = torch.linspace(-1, 1, TOKENS) if reduction == "none" else None
    known = logits(th, tw).log_softmax(-1).topk(6)
    indices = known.indices.clone()
    indices[1, 2:] = -1
    rows = torch.arange(TOKENS)[:, None]

    def op(h, w):
        options = {"reduction": reduction, "plan": plan, "temperature": 1.3}
        if name == "cross_entropy":
            return ops.linear_cross_entropy(h, p.shard(w), labels, **options)
        if name == "uniform":
            return ops.linear_uniform_kl(h, p.shard(w), **options)
        if name == "lse":
            lse = ops.linear_lse(h, p.shard(w), plan=plan, temperature=1.3)
            return lse if reduction == "none" else lse.mean()
        return ops.linear_sparse_kl_div(h, p.shard(w), indices, known.values.float(), tail=name, **options)

    def formula(h, w):
        z = logits(h, w, temperature=1.3)
        if name == "cross_entropy":
            return F.cross_entropy(z, labels, reduction=reduction)
        if name == "uniform":
            loss = divergence(z, z, "uniform")
        elif name == "lse":
            loss = z.logsumexp(-1)
        else:
            held = torch.zeros(TOKENS, VOCABULARY + 1, dtype=torch.bool)
            held[rows, torch.where(indices >= 0, indices, VOCABULARY)] = True
            held = held[:, :-1]
            t = torch.zeros_like(z).scatter(1, known.indices, known.values.to(z.dtype).exp()) * held
            if name == "renormalize":
                t = t / t.sum(-1, keepdim=True)
                loss = torch.where(held, t * (t.clamp_min(1e-30).log() - z.masked_fill(~held, -1e30).log_softmax(-1)), 0.0).sum(
                    -1
                )
            else:
                log_s = z.log_softmax(-1)
                rest, left = log_s.masked_fill(held, -torch.inf).logsumexp(-1), 1 - t.sum(-1)
                loss = torch.where(held, t * (t.clamp_min(1e-30).log() - log_s), 0.0).sum(-1) + left * (left.log() - rest)
        return loss if reduction == "none" else loss.mean()

    with on(where, plan):
        check(p, op, formula, [h, w], {1}, seeds)


def labels_beside(p, where, plan):
    """Divergence and cross-entropy in one call, with statistics; a normalizer; labels that other processes hold."""
    h, w, th, tw = draw(TOKENS, VOCABULARY, WIDTH, 7)
    tw[5] = 4 * tw[5]
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(2))
    z_t = logits(th, tw)
    seen = []

    def op(h, w):
        loss, stats = ops.linear_kl_div(
            h, p.shard(w), th, p.shard(tw), labels=labels, label_weight=0.7, normalizer=50.0, return_stats=True, plan=plan
        )
        seen.append(stats)
        return loss

    def formula(h, w):
        z = logits(h, w)
        return (divergence(z, z_t.to(z.dtype), "forward").sum() + 0.7 * F.cross_entropy(z, labels, reduction="sum")) / 50

    with on(where, plan):
        check(p, op, formula, [h, w], {1})
    stats, z_s = seen[0], logits(h, w)
    log_t = z_t.log_softmax(-1)
    wanted = (z_s.logsumexp(-1), z_t.logsumexp(-1), -(log_t.exp() * log_t).sum(-1), (z_s.argmax(-1) == z_t.argmax(-1)).double())
    for got, want in zip(stats[:4], wanted, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-6)
    with on(where, plan):
        same = ops.linear_kl_div(th, p.shard(tw), th, p.shard(tw), return_stats=True, plan=plan)
    assert same[0] == 0 and (same[1].top1_agreement == 1).all()


def near_agreement(p, where, plan, kind, dtype, tokens=48, vocabulary=VOCABULARY):
    """The gradient's relative error does not grow as KL goes from 1 to 1e-6: the property of the difference form."""
    generator = torch.Generator().manual_seed(5)
    teacher = torch.randn(tokens, 64, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, 64, generator=generator) / 8).to(dtype)
    step = torch.randn(tokens, 64, generator=generator)
    z_t, seen = logits(teacher, weight, softcap=30.0), []
    for size in (2.0, 0.4, 0.1, 0.01, 0.0015):
        hidden = (teacher.float() + size * step * (teacher.float().norm() / step.norm())).to(dtype)
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        exact = [t.detach().double().requires_grad_() for t in leaves]
        options = {"student_softcap": 30.0, "teacher_softcap": 30.0, "divergence": kind, "plan": plan}
        with on(where, plan):
            got = ops.linear_kl_div(leaves[0], p.shard(leaves[1]), teacher, p.shard(weight), **options)
            found = gradients(got * 65536, leaves)
        wanted = divergence(logits(*exact, softcap=30.0), z_t, kind).mean()
        kl = wanted.item()
        seen.append(kl)
        assert float(got.detach()) >= 0 and abs(float(got.detach()) - kl) < 1e-3 * kl, (kl, float(got.detach()))
        limit = 0.01 if dtype != torch.float32 else 1e-4 if kl >= 1e-3 else 3e-3
        for a, b in zip((found[0], p.whole(found[1])), gradients(wanted * 65536, exact), strict=True):
            assert relative(a, b) < limit, (kl, relative(a, b))
    assert max(seen) > 0.2 and min(seen) < 3e-6, seen


def peaked(p, where, plan):
    """Peaked teachers that the student agrees with: the gap of the log-sum-exps is not the difference of two rounded sums."""
    eye = torch.eye(8)
    for kind in KINDS:
        for spread in (1, 4, 12):
            z_s, z_t = near_logits(8, VOCABULARY, spread)
            weight = z_s.T.contiguous().requires_grad_()  # with the identity as hidden states it is the logits
            head, other = p.shard(weight), p.shard(z_t.T.contiguous())
            with on(where, plan):
                loss = ops.linear_kl_div(eye, head, eye, other, divergence=kind, reduction="sum", plan=plan)
                (got,) = gradients(loss, [weight])
            wanted = logit_gradient(z_s, z_t, kind)
            error = relative(p.whole(got).T, wanted)
            assert wanted.norm() > 1e-9 and error < 1e-3, (kind, spread, error)


@contextlib.contextmanager
def collectives():
    """Lists the all-reduces inside the block, operation and bytes, and asserts that nothing else is communicated."""
    seen, original = [], dist.all_reduce

    def counted(tensor, op=dist.ReduceOp.SUM, group=None, async_op=False):
        seen.append(("max" if op == dist.ReduceOp.MAX else "sum", tensor.numel() * tensor.element_size()))
        return original(tensor, op, group, async_op)

    dist.all_reduce = counted
    try:
        with CommDebugMode() as mode:  # sees collectives outside of the ops of torch.library, which hide theirs
            yield seen
    finally:
        dist.all_reduce = original
    assert {str(name) for name in mode.get_comm_counts()} <= {"c10d.allreduce_"}, mode.get_comm_counts()
    assert mode.get_total_counts() in (0, len(seen)), (mode.get_comm_counts(), seen)


def traffic(p, where, plan):
    """Every call exchanges what ``bytes_exchanged`` says: one MAX, one SUM, the losses, the hidden gradient; nothing wider."""
    h, w, th, tw = draw(TOKENS, VOCABULARY, WIDTH, 7)
    labels = torch.arange(TOKENS)
    known = logits(th, tw).log_softmax(-1).topk(6)
    w_s, w_t, ranks = p.shard(w), p.shard(tw), p.mesh.size()
    mask = torch.arange(TOKENS) % 5 != 2
    calls = [
        ({"target": kind}, lambda h, w, kind=kind: ops.linear_kl_div(h, w, th, w_t, divergence=kind, plan=plan))
        for kind in KINDS
    ]
    calls += [
        ({"target": "own", "labels": True}, lambda h, w: ops.linear_cross_entropy(h, w, labels, plan=plan)),
        ({"target": "uniform"}, lambda h, w: ops.linear_uniform_kl(h, w, plan=plan)),
        ({"target": "bucket", "known": 6}, lambda h, w: ops.linear_sparse_kl_div(h, w, *reversed(known), plan=plan)),
        (
            {"target": "forward", "labels": True, "statistics": True},
            lambda h, w: ops.linear_kl_div(h, w, th, w_t, labels=labels, label_weight=1.0, return_stats=True, plan=plan)[0],
        ),
        (
            {"target": "forward", "tokens": TOKENS if where == "triton" else int(mask.sum())},  # a GPU would wait to count them
            lambda h, w: ops.linear_kl_div(h, w, th, w_t, mask=mask, plan=plan),
        ),
    ]
    for given, call in calls:
        if (where, plan, given["target"]) == ("triton", "recompute", "bucket"):  # there is no such plan
            continue
        wanted = bytes_exchanged(**{"tokens": TOKENS, "width": WIDTH, "ranks": ranks, **given})
        with on(where, plan), collectives() as seen:
            call(h.clone().requires_grad_(), w_s.detach().requires_grad_()).backward()
        if (
            where == "reference"
        ):  # the same collectives in the dtype of the logits; those of uniform have columns that C++ knows
            assert [op for op, _ in seen] == ["max"] + ["sum"] * (len(wanted) - 1), (given, seen)
        else:
            assert seen == [("max" if name == "maxima" else "sum", size) for name, size in wanted.items()], (
                given,
                seen,
                wanted,
            )
        with torch.no_grad(), collectives() as seen:
            call(h, w_s)
        assert len(seen) == len(wanted) - 1, (given, seen)
    with collectives() as seen:  # the backward of reduction="none" computes the statistics again
        ops.linear_kl_div(h.clone().requires_grad_(), w_s, th, w_t, reduction="none", plan=plan).sum().backward()
    assert len(seen) == (4 if where == "reference" else 6), seen


def few_entries(p, where, plan):
    """A vocabulary smaller than the number of processes; no counted token; one token."""
    for vocabulary, tokens in ((3, TOKENS), (5, 1), (5, 0)):
        h, w, th, tw = draw(tokens, vocabulary, WIDTH, 7)
        op = lambda h, w: ops.linear_kl_div(h, p.shard(w), th, p.shard(tw), plan=plan)  # noqa: B023, E731
        formula = lambda h, w: divergence(logits(h, w), logits(th, tw), "forward").sum() / max(tokens, 1)  # noqa: B023, E731
        with on(where, plan):
            check(p, op, formula, [h, w], {1})
    mask = torch.zeros(TOKENS, dtype=torch.bool)
    h, w, th, tw = draw(TOKENS, 40, WIDTH, 7)
    leaves = [h.requires_grad_(), w.requires_grad_()]
    loss = ops.linear_kl_div(leaves[0], p.shard(leaves[1]), th, p.shard(tw), mask=mask, plan=plan)
    assert loss == 0 and all((g == 0).all() for g in gradients(loss, leaves))


def several_chunks(p):
    """Tokens in several chunks are exchanged together."""
    before, cpu.plan._CHUNK = cpu.plan._CHUNK, 8
    try:
        for kind in KINDS:
            dense(p, "cpu", "recompute", kind, "mean", {})
        labels_beside(p, "cpu", "recompute")
        traffic(p, "cpu", "recompute")
        h, w, _, _ = draw(TOKENS, VOCABULARY, WIDTH, 7)
        with torch.no_grad(), collectives() as seen:
            ops.linear_lse(h, p.shard(w), plan="recompute")
        assert [op for op, _ in seen] == ["max", "sum"], seen
    finally:
        cpu.plan._CHUNK = before


def agree(p):
    """Two calls give the same bits; all processes get the same loss and hidden gradient; the weight's gradient stays sharded."""
    h, w, th, tw = draw(TOKENS, VOCABULARY, WIDTH, 7)
    found = []
    for _ in range(2):
        head = distribute_tensor(w, p.mesh, [Shard(0)]).requires_grad_()
        hidden = h.clone().requires_grad_()
        loss = ops.linear_kl_div(hidden, head, th, p.shard(tw), plan="recompute")
        loss.backward()
        assert isinstance(head.grad, DTensor) and head.grad.placements == (Shard(0),) and head.grad.shape == w.shape
        found.append((loss.detach(), hidden.grad, head.grad.to_local()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    for tensor in found[0][:2]:
        gathered = [torch.empty_like(tensor) for _ in range(p.mesh.size())]
        dist.all_gather(gathered, tensor)
        assert all(torch.equal(other, tensor) for other in gathered)
    replicated = DTensor.from_local(h.clone(), p.mesh, [Replicate()], run_check=False).requires_grad_()
    mask = DTensor.from_local(torch.ones(TOKENS, dtype=torch.bool), p.mesh, [Replicate()], run_check=False)
    ops.linear_kl_div(replicated, p.shard(w), th, p.shard(tw), mask=mask, plan="recompute").backward()
    assert replicated.grad.placements == (Replicate(),) and torch.equal(replicated.grad.to_local(), found[0][1])


def recomputed(p):
    """Activation checkpointing runs the forward, and its exchanges, again on all processes alike."""
    h, w, th, tw = draw(TOKENS, VOCABULARY, WIDTH, 7)
    results = []
    for wrapped in (False, True):
        leaves = [h.clone().requires_grad_(), w.clone().requires_grad_()]
        op = lambda h, w: ops.linear_kl_div(h.tanh(), p.shard(w), th, p.shard(tw), plan="recompute")  # noqa: E731
        loss = checkpoint(op, *leaves, use_reentrant=False) if wrapped else op(*leaves)
        results.append(gradients(loss, leaves))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def sixteen_bits(p, where, plan):
    """16-bit hidden states and weights: the processes' parts of the hidden gradient are summed in float32."""
    for dtype in (torch.bfloat16, torch.float16):
        h, w, th, tw = draw(TOKENS, VOCABULARY, 32, 32, dtype=dtype)
        w += 20  # a common component, which cancels in the sum over the vocabulary but in no part of it

        def found(head, other, dtype=dtype, h=h, w=w, th=th):
            leaves = [h.clone().requires_grad_(), w.clone().requires_grad_()]
            with on(where, plan):
                got = gradients(ops.linear_kl_div(leaves[0], head(leaves[1]), th, other, plan=plan), leaves)
            assert all(gradient.dtype == dtype for gradient in got)
            return got

        exact = [t.double().requires_grad_() for t in (h, w)]
        wanted = gradients(divergence(logits(*exact), logits(th, tw), "forward").mean(), exact)
        shared, alone = found(p.shard, p.shard(tw)), found(lambda w: w, tw)
        for got, one, want in zip((shared[0], p.whole(shared[1].float())), alone, wanted, strict=True):
            # One process with 16-bit products rounds the gradient by the logits, which the common component makes large.
            assert relative(got, want) < max(0.01, 2 * relative(one, want)), (dtype, relative(got, want), relative(one, want))


def refused(p):
    """What cannot work is refused by name before anything is exchanged, on all processes alike."""
    h, w, th, tw = draw(TOKENS, VOCABULARY, WIDTH, 7)
    w_s, w_t = p.shard(w), p.shard(tw)
    bias = torch.zeros(VOCABULARY)
    spread = DTensor.from_local(h, p.mesh, [Partial()], run_check=False)
    copied = DTensor.from_local(w, p.mesh, [Replicate()], run_check=False)
    wide = p.shard(torch.cat([tw, tw]))
    cases = [
        ("^teacher_weight: got a whole head", lambda: ops.linear_kl_div(h, w_s, th, tw)),
        ("^teacher_weight: got a sharded head", lambda: ops.linear_kl_div(h, w, th, w_t)),
        ("^teacher_weight: got 2062 rows", lambda: ops.linear_kl_div(h, w_s, th, wide, vocab_size=1000)),
        (r"^student_weight: got a DTensor with placements \(Replicate", lambda: ops.linear_kl_div(h, copied, th, w_t)),
        ("^student_bias: got a plain tensor", lambda: ops.linear_kl_div(h, w_s, th, w_t, student_bias=bias)),
        ("^student_bias: got a DTensor", lambda: ops.linear_kl_div(h, w, th, tw, student_bias=p.shard(bias))),
        (r"^student_hidden: got a DTensor with placements \(Partial", lambda: ops.linear_kl_div(spread, w_s, th, w_t)),
        ("^mask: got a DTensor", lambda: ops.linear_kl_div(h, w_s, th, w_t, mask=spread)),
        ("^labels: got 1031", lambda: ops.linear_cross_entropy(h, w_s, torch.full((TOKENS,), VOCABULARY))),
        ("^logits: got a DTensor", lambda: ops.kl_div(spread, spread)),
    ]
    with collectives() as seen:
        for text, call in cases:
            expect(ValueError, text, call)
    assert not seen, seen
    data_parallel = h + dist.get_rank()
    wild = h + (dist.get_rank() == 1) * (0.015 + 10.0 * (-1.0) ** torch.arange(WIDTH))  # within its own rounding, not rank 0's
    for (where, plan), other in itertools.product((CPP, PLAIN), (data_parallel, wild)):
        with backend(where):  # an error on some processes only would leave the others waiting
            call = lambda plan=plan, other=other: ops.linear_kl_div(other, w_s, th, w_t, plan=plan)  # noqa: E731
            expect(ValueError, "^hidden: got different hidden states", call)


def expect(kind, text, call):
    try:
        call()
    except kind as error:
        assert re.search(text, str(error)), f"{error} does not match {text}"
        return
    raise AssertionError(f"no error where {text} was expected")
