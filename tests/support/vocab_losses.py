"""Float64 formulas of the vocabulary losses that share no code with them, and inputs for both."""

import math

import torch

ROWS, VOCABULARY, WIDTH, TEACHER_WIDTH = 37, 2311, 12, 7  # more than two tiles, and prime


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
