"""``accumulate_into``: the gradient of a head is added to its parameter's, in place, or the call is refused."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
import undo_kernels
from rounding import assert_as_exact_as, unit
from torch.utils._python_dispatch import TorchDispatchMode
from undo_kernels import cpu, ops

V, D, TOKENS, BATCHES = 2311, 48, 9, 3
INTERPRETED = 97  # entries of the vocabulary where Triton interprets
NEEDS = {
    "cpu": pytest.mark.skipif(cpu.vocab_loss.kernels is None, reason="no C++ compiler was here when undo-core was installed"),
    "triton": pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs on the GPU, and the tensors are on the CPU"),
    "reference": (),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter of Triton is numpy
    pytest.mark.usefixtures("small_tiles"),
]


def draw(number, dtype=torch.float32, entries=V, tokens=TOKENS):
    """Hidden states of student and teacher, labels, and the known entries of a teacher."""
    g = torch.Generator().manual_seed(number)
    h, t = (torch.randn(tokens, D, generator=g).to(dtype) for _ in range(2))
    known = torch.stack([torch.randperm(entries, generator=g)[:4] for _ in range(tokens)])
    return h.requires_grad_(), t, torch.randint(entries, (tokens,), generator=g), known


def heads(dtype=torch.float32, rows=V):
    g = torch.Generator().manual_seed(100)
    weight, other = (torch.randn(rows, D, generator=g).mul_(0.3).to(dtype) for _ in range(2))
    return torch.nn.Parameter(weight), other


LOGPROBS = torch.tensor([0.4, 0.3, 0.1, 0.05]).log().expand(TOKENS, 4)


def kl(weight, other, batch, **options):
    return ops.linear_kl_div(batch[0], weight, batch[1], other, student_softcap=9.0, teacher_softcap=9.0, **options)


def jsd(weight, other, batch, **options):
    options |= {"divergence": "jsd", "labels": batch[2], "label_weight": 0.5}
    return ops.linear_kl_div(batch[0], weight, batch[1], other, **options)


def cross_entropy(weight, other, batch, **options):
    return ops.linear_cross_entropy(batch[0], weight, batch[2], **options)


def uniform(weight, other, batch, **options):
    return ops.linear_uniform_kl(batch[0], weight, **options)


def sparse(weight, other, batch, **options):
    return ops.linear_sparse_kl_div(batch[0], weight, batch[3], LOGPROBS, **options)


def tokens(weight, other, batch, **options):
    return ops.linear_cross_entropy(batch[0], weight, batch[2], reduction="none", **options).square().mean()


def exact(loss, weight, other, batch):
    """The loss by torch's own functions, in the dtype of the weight."""
    h, t, labels, known = (x.to(weight.dtype) if x.is_floating_point() else x for x in batch)
    cap = 9.0 if loss is kl else None
    s, z = ((9.0 * torch.tanh(z / 9.0)) if cap else z for z in (h @ weight.T, t @ other.T))
    s, z = s.log_softmax(-1), z.log_softmax(-1)
    nll = F.nll_loss(s, labels, reduction="none")
    if loss is kl:
        return (z.exp() * (z - s)).sum(-1).mean()
    if loss is jsd:
        m = torch.logaddexp(z, s) - torch.log(torch.tensor(2.0, dtype=s.dtype))
        return ((z.exp() * (z - m)).sum(-1) + (s.exp() * (s - m)).sum(-1)).mean() / 2 + nll.mean() / 2
    if loss is uniform:
        return -(s.mean(-1) + torch.log(torch.tensor(float(len(weight)), dtype=s.dtype))).mean()
    if loss is sparse:
        p, q = LOGPROBS.to(s.dtype), s.gather(-1, known)
        rest, rest_q = torch.log1p(-p.exp().sum(-1)), torch.log1p(-q.exp().sum(-1))
        return ((p.exp() * (p - q)).sum(-1) + rest.exp() * (rest - rest_q)).mean()
    return nll.square().mean() if loss is tokens else nll.mean()


LOSSES = (kl, jsd, cross_entropy, uniform, sparse, tokens)


def accumulated(loss, backend, dtype, into, entries=V, tokens=TOKENS, **options):
    """Gradients of the weight after each micro-batch, and those of the hidden states."""
    weight, other = heads(dtype, entries)
    after, hidden = [], []
    with undo_kernels.backend(backend):
        for number in range(BATCHES):
            batch = draw(number, dtype, entries, tokens)
            given = {"accumulate_into": weight} if into else {}
            (loss(weight, other, batch, **given, **options) * (65536.0 / BATCHES)).backward()
            after.append(weight.grad.clone())
            hidden.append(batch[0].grad)
    return after, hidden


SUMS = [
    *[("cpu", loss, plan) for loss in LOSSES for plan in ("chunk", "recompute")],
    *[("reference", loss, "direct") for loss in LOSSES],
    *[("triton", kl, plan) for plan in ("chunk", "recompute")],  # interpreted, so few
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("backend", "loss", "plan"), [pytest.param(*case, marks=NEEDS[case[0]]) for case in SUMS])
def test_the_sum_is_the_same(backend, loss, plan, dtype):
    compare(loss, backend, dtype, INTERPRETED if backend == "triton" else V, TOKENS, plan=plan)


def compare(loss, backend, dtype, entries, tokens, **options):
    """The first gradient has the bits of the usual way; each later one errs no more than the usual one, against float64."""
    ours, hidden = accumulated(loss, backend, dtype, True, entries, tokens, **options)
    usual, usual_hidden = accumulated(loss, backend, dtype, False, entries, tokens, **options)
    assert torch.equal(ours[0], usual[0]) and torch.equal(hidden[0], usual_hidden[0])
    weight, other = heads(dtype, entries)
    weight = weight.detach().double().requires_grad_()
    for number in range(BATCHES):
        batch = [x.detach().double() if x.is_floating_point() else x for x in draw(number, dtype, entries, tokens)]
        batch[0].requires_grad_()
        (exact(loss, weight, other.double(), batch) * (65536.0 / BATCHES)).backward()
        assert_as_exact_as(ours[number], usual[number], weight.grad, 2 * unit(dtype), f"weight after {number + 1}")
        assert_as_exact_as(hidden[number], usual_hidden[number], batch[0].grad, 2 * unit(dtype), f"hidden {number}")


@NEEDS["cpu"]
@pytest.mark.parametrize("workspace", [4_000_000, 1_200_000], ids=["chunks", "a sum in float32"])
def test_a_sixteen_bit_gradient_of_many_chunks(workspace):
    compare(cross_entropy, "cpu", torch.bfloat16, V, 400, plan="chunk", workspace_bytes=workspace)


def test_plain_torch_that_recomputes_its_chunks():
    compare(kl, "reference", torch.float32, V, 64, plan="direct", workspace_bytes=1_000_000)


class Large(TorchDispatchMode):
    """Counts new tensors of at least so many bytes."""

    def __init__(self, least):
        super().__init__()
        self.least, self.seen = least, []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        held = {t.untyped_storage().data_ptr() for t in arguments if isinstance(t, torch.Tensor)}
        held |= {t.untyped_storage().data_ptr() for t in (keywords or {}).values() if isinstance(t, torch.Tensor)}
        results = function(*arguments, **(keywords or {}))
        for result in results if isinstance(results, (tuple, list)) else [results]:
            large = isinstance(result, torch.Tensor) and result.nbytes >= self.least
            if large and result.untyped_storage().data_ptr() not in held:
                self.seen.append(str(function))
        return results


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [  # plain torch widens a whole bfloat16 weight for its product
        pytest.param("cpu", torch.float32, marks=NEEDS["cpu"]),
        pytest.param("cpu", torch.bfloat16, marks=NEEDS["cpu"]),
        ("reference", torch.float32),
    ],
)
def test_no_second_gradient_is_held(backend, dtype):
    """Nothing of the weight's size is allocated from the second micro-batch on; without the option, its gradient is."""
    for into, found in ((True, False), (False, True)):
        weight, other = heads(dtype)
        weight.grad = torch.zeros_like(weight)
        held, plan = weight.grad.data_ptr(), "direct" if backend == "reference" else "recompute"
        with undo_kernels.backend(backend), Large(weight.nbytes) as large:
            given = {"accumulate_into": weight} if into else {}
            cross_entropy(weight, other, draw(0, dtype), plan=plan, **given).backward()
        assert bool(large.seen) == found and weight.grad.data_ptr() == held and weight.grad.any()


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=NEEDS["cpu"]), "reference"])
class TestAutograd:
    """What autograd may do with the loss."""

    def start(self, backend, **options):
        weight, other = heads()
        weight.grad = torch.ones_like(weight)
        batch = draw(0)
        with undo_kernels.backend(backend):
            return weight, batch, kl(weight, other, batch, accumulate_into=weight, plan=self.plan(backend), **options)

    def plan(self, backend):
        return "direct" if backend == "reference" else "recompute"

    def alone(self, backend):
        weight, other = heads()
        with undo_kernels.backend(backend):
            kl(weight, other, draw(0), plan=self.plan(backend)).backward()
        return weight.grad

    def same(self, got, wanted):
        assert_as_exact_as(got, wanted, wanted, 2.0**-20)

    def test_a_graph_that_is_kept_adds_again(self, backend):
        weight, _, loss = self.start(backend)
        loss.backward(retain_graph=True)
        (3 * loss).backward()
        self.same(weight.grad, 1 + 4 * self.alone(backend))

    def test_a_gradient_cleared_before_the_backward_is_not_added_to(self, backend):
        weight, _, loss = self.start(backend)
        weight.grad = None
        loss.backward()
        self.same(weight.grad, self.alone(backend))

    def test_a_forward_alone_changes_nothing(self, backend):
        weight, _, loss = self.start(backend)
        del loss
        assert torch.equal(weight.grad, torch.ones_like(weight))

    def test_only_the_inputs_that_are_named_get_a_gradient(self, backend):
        weight, batch, loss = self.start(backend)
        loss.backward(inputs=[batch[0]], retain_graph=True)
        (hidden,) = torch.autograd.grad(loss, batch[0], retain_graph=True)
        assert torch.equal(hidden, batch[0].grad) and torch.equal(weight.grad, torch.ones_like(weight))
        loss.backward(inputs=[weight])
        self.same(weight.grad, 1 + self.alone(backend))

    def test_a_weight_frozen_since_gets_none(self, backend):
        weight, batch, loss = self.start(backend)
        weight.requires_grad_(False)
        loss.backward()
        assert batch[0].grad.any() and torch.equal(weight.grad, torch.ones_like(weight))

    def test_a_gradient_that_is_returned_is_refused(self, backend):
        weight, _, loss = self.start(backend)
        with pytest.raises(RuntimeError, match=r"^accumulate_into: got torch.autograd.grad with respect to the parameter"):
            torch.autograd.grad(loss, weight)
        assert torch.equal(weight.grad, torch.ones_like(weight))

    def test_a_second_derivative_is_refused(self, backend):
        weight, batch, loss = self.start(backend)
        with pytest.raises(RuntimeError, match=r"create_graph=True"):
            torch.autograd.grad(loss, batch[0], create_graph=True)
        assert torch.equal(weight.grad, torch.ones_like(weight))

    def test_a_hook_that_was_set_since_is_refused(self, backend):
        weight, _, loss = self.start(backend)
        weight.register_post_accumulate_grad_hook(lambda parameter: None)
        with pytest.raises(ValueError, match=r"^accumulate_into: got a parameter with 1 gradient hooks"):
            loss.backward()
        assert torch.equal(weight.grad, torch.ones_like(weight))


def test_two_losses_in_one_graph_and_a_part_of_the_parameter():
    """A forget and a retain loss; the parameter's last rows are padding, which the model drops."""
    parameter, other = heads(rows=V + 57)
    parameter.grad = torch.ones_like(parameter)
    weight, batches = parameter[:V], [draw(0), draw(1)]
    loss = kl(weight, other[:V], batches[0], accumulate_into=parameter) - 2 * cross_entropy(
        weight, None, batches[1], accumulate_into=parameter, mask=torch.arange(TOKENS) > 2, vocab_size=V - 5
    )
    loss.backward()
    usual, _ = heads(rows=V + 57)
    weight = usual[:V]
    loss = kl(weight, other[:V], draw(0)) - 2 * cross_entropy(
        weight, None, draw(1), mask=torch.arange(TOKENS) > 2, vocab_size=V - 5
    )
    loss.backward()
    assert_as_exact_as(parameter.grad, usual.grad + 1, usual.grad + 1, 2.0**-20)
    assert torch.equal(parameter.grad[V - 5 :], 1 + usual.grad[V - 5 :])


@pytest.mark.parametrize("frozen", ["weight", "everything", "no grad"])
def test_where_there_is_no_gradient_the_option_does_nothing(frozen):
    weight, other = heads()
    weight.requires_grad_(frozen == "no grad")
    batch = draw(0)
    batch[0].requires_grad_(frozen == "weight")
    with torch.no_grad() if frozen == "no grad" else contextlib.nullcontext():
        loss = kl(weight, other, batch, accumulate_into=weight)
    if frozen == "weight":
        loss.backward()
        usual = draw(0)
        kl(weight, other, usual).backward()
        assert torch.equal(batch[0].grad, usual[0].grad)
    assert weight.grad is None and loss.requires_grad == (frozen == "weight")


def test_autocast_adds_to_the_parameters_dtype():
    """As under AMP: 16-bit hidden states, a float32 parameter."""
    gradients = []
    for into in (True, False):
        weight, other = heads()
        for number in range(2):
            h, t, labels, known = draw(number)
            with torch.autocast("cpu", torch.bfloat16):
                hidden = h @ torch.eye(D)
                assert hidden.dtype == torch.bfloat16
                given = {"accumulate_into": weight} if into else {}
                loss = kl(weight, other, (hidden, t, labels, known), **given)
            loss.backward()
        gradients.append(weight.grad)
    assert_as_exact_as(*gradients, gradients[1], 2.0**-20)


def test_modules_take_it():
    weight, other = heads()
    weight.grad = torch.zeros_like(weight)
    h, t, labels, _ = draw(0)
    undo_kernels.LinearKLDivLoss()(h, weight, t, other, accumulate_into=weight).backward()
    undo_kernels.LinearCrossEntropyLoss()(h, weight, labels, accumulate_into=weight).backward()
    usual, _ = heads()
    (ops.linear_kl_div(h, usual, t, other) + ops.linear_cross_entropy(h, usual, labels)).backward()
    assert_as_exact_as(weight.grad, usual.grad, usual.grad, 2.0**-20)


def hooked(weight):
    weight.register_hook(lambda gradient: None)
    return weight


def with_gradient(weight, gradient):
    weight.grad = gradient
    return weight


REFUSED = {
    "a module": (lambda w: torch.nn.Linear(1, 1), r"got Linear, wanted a tensor that is student_weight itself"),
    "another": (
        lambda w: torch.nn.Parameter(w.detach().clone()),
        r"got another tensor, of shape \(2311, 48\) and torch.float32",
    ),
    "later rows": (lambda w: torch.nn.Parameter(w.detach()[1:]), r"got another tensor"),
    "computed": (lambda w: w * 1, r"got a tensor that was computed"),
    "hooked": (hooked, r"got a parameter with 1 gradient hooks"),
    "sparse": (
        lambda w: with_gradient(w, torch.zeros(V, D).to_sparse()),
        r"got a parameter with a gradient of layout torch.sparse",
    ),
    "expanded": (
        lambda w: with_gradient(w, torch.zeros(1, D).expand(V, D)),
        r"got 'grad', whose elements share memory",
    ),
    "gradient in the weight": (lambda w: with_gradient(w, w.data), r"got 'grad' and 'student_weight', which share memory"),
    "with a graph": (
        lambda w: with_gradient(w, torch.zeros(V, D, requires_grad=True)),
        r"got a parameter with a gradient .* with a graph",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    weight, other = heads()
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match="^accumulate_into: " + message):
        kl(weight, other, draw(0), accumulate_into=make(weight))


class Scaled(torch.autograd.Function):
    """A view whose gradient is scaled."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return 10 * gradient


def retained(part):
    part.retain_grad()
    return part


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (lambda w: Scaled.apply(w), "whose memory the weight shares by way of ScaledBackward"),
        (lambda w: torch.nn.Parameter(w.detach()), "whose memory the weight shares by way of another leaf"),
        (lambda w: hooked(w[:V]), "a part of the parameter with a gradient hook"),
        (lambda w: retained(w[:V]), "a part of the parameter with a gradient hook or retain_grad"),
    ],
    ids=["scaled", "alias", "hooked", "retained"],
)
def test_weights_whose_gradient_is_not_the_parameter_s_are_refused(part, message):
    weight, other = heads()
    weight.grad = torch.ones_like(weight)
    with pytest.raises(ValueError, match="^accumulate_into: got " + ("a parameter " if "memory" in message else "") + message):
        kl(part(weight), other, draw(0), accumulate_into=weight)


@pytest.mark.parametrize("plan", ["direct", "chunk"])
def test_a_gradient_by_a_part_of_the_parameter_is_refused(plan):
    weight, other = heads()
    weight.grad = torch.ones_like(weight)
    part = weight[:V]
    loss = kl(part, other, draw(0), accumulate_into=weight, plan=plan)
    with pytest.raises(
        RuntimeError, match=r"^accumulate_into: got torch.autograd.grad with respect to a part of the parameter"
    ):
        torch.autograd.grad(loss, part)
    assert torch.equal(weight.grad, torch.ones_like(weight))


def test_float16_several_processes_and_compiled_graphs_are_refused(monkeypatch):
    weight, other = heads(torch.float16)
    with pytest.raises(ValueError, match=r"^accumulate_into: got a float16 parameter"):
        kl(weight, other, draw(0, torch.float16), accumulate_into=weight)
    weight, other = heads()
    with monkeypatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "get_world_size", lambda: 2)
        with pytest.raises(ValueError, match=r"^accumulate_into: got a process group of 2 processes"):
            kl(weight, other, draw(0), accumulate_into=weight)
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        with pytest.raises(ValueError, match=r"^accumulate_into: got a call inside torch.compile"):
            kl(weight, other, draw(0), accumulate_into=weight)
