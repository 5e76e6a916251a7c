"""Float64 formulas of the vocabulary losses that share no code with them, and inputs for both."""

import contextlib
import math

import torch
from rounding import assert_as_exact_as, probability_error

ROWS, VOCABULARY, WIDTH, TEACHER_WIDTH = 37, 2311, 12, 7  # more than two tiles, and prime


_dtype = torch.float64  # of the formulas


@contextlib.contextmanager
def computed_in(dtype):
    """Evaluates the formulas in another dtype: what plain torch makes of the same inputs."""
    global _dtype
    before, _dtype = _dtype, dtype
    try:
        yield
    finally:
        _dtype = before


def logits(hidden, weight, scale=1.0, softcap=None, bias=None, temperature=1.0, vocab_size=None):
    z = hidden.to(_dtype) @ weight.to(_dtype).T
    z = (z if bias is None else z + bias.to(_dtype)) * scale
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


def logit_gradient(z_s, z_t, kind):
    """Gradient of the summed divergence for the student's logits, in float64, without the cancellation of a difference of sums."""
    s, t = z_s.detach().double().log_softmax(-1), z_t.double().log_softmax(-1)
    x = s - t
    if kind == "forward":
        return t.exp() * x.expm1()
    if kind == "reverse":
        return s.exp() * (x - (s.exp() * x).sum(-1, keepdim=True))
    m = torch.logaddexp(s, t) - math.log(2)
    return 0.5 * s.exp() * ((s - m) - (s.exp() * (s - m)).sum(-1, keepdim=True))


def draw(rows=ROWS, vocabulary=VOCABULARY, width=WIDTH, teacher_width=TEACHER_WIDTH, spread=1.0, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    tensors = [make(rows, width) * spread, make(vocabulary, width) / width**0.5]
    tensors += [make(rows, teacher_width) * spread, make(vocabulary, teacher_width) / teacher_width**0.5]
    return [tensor.to(dtype) for tensor in tensors]


def near_logits(tokens, vocabulary, spread, seed=2):
    """Logits of a student and of a teacher that it almost agrees with, in multiples of 2**-17 below 64.

    Their differences are exact in float32, also from their maxima: what remains is the error of the gap of the two log-sum-exps, which
    float32 sums would leave at 1e-7, where the logits differ by 1e-5.
    """
    generator = torch.Generator().manual_seed(seed)
    make = lambda: torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64)  # noqa: E731
    student = ((make() * spread).clamp(-60, 60) * 2**12).round() / 2**12
    return student.float(), (student + make().mul(1.3).round() / 2**17).float()


def gradients(loss, inputs, seeds=None):
    return torch.autograd.grad(loss if loss.ndim == 0 else (loss * seeds).sum(), inputs)


def values(function, tensors, seeds=None):
    """Loss and gradients of a function of tensors."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    loss = function(*leaves)
    return [loss.detach(), *gradients(loss, leaves, seeds)]


def assert_as_exact_as_torch(op, formula, tensors, seeds=None, floor=None):
    """An op's loss and gradients in float32 against the formula in float64, their errors against those of the formula in
    float32.

    ``floor`` is the relative error that rounding may cause where torch happens to be exact; without one it is that of the
    probabilities of a head whose hidden states and weight come first. Returns the op's results.
    """
    got = values(op, tensors, seeds)
    want = values(formula, [t.double() for t in tensors], seeds)
    with computed_in(torch.float32):
        plain = values(formula, tensors, seeds)
    floor = probability_error(*tensors[:2]) if floor is None else floor
    for name, ours, theirs, exact in zip(("loss", *map(str, range(len(tensors)))), got, plain, want, strict=True):
        assert_as_exact_as(ours, theirs, exact, floor, name)
    return got
