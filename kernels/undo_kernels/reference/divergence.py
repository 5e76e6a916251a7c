"""Divergences of rows of logits and their gradients, in difference form.

With ``u = z_s - max z_s``, ``v = z_t - max z_t`` and ``x = log p_s - log p_t = (u - v) - gap``::

    KL(t || s) = sum p_t (expm1(x) - x)          dKL/dz_s = p_t expm1(x) = p_s - p_t
    KL(s || t) = sum p_s (expm1(-x) + x)         dKL/dz_s = p_s (x - KL)
    JSD        = beta KL(t || m) + (1 - beta) KL(s || m),  m = beta t + (1 - beta) s
                                                 dJSD/dz_s = (1 - beta) p_s (log(s / m) - KL(s || m))

Every term is >= 0, and nothing cancels as the two distributions approach each other. The gap of the two log-sum-exps comes from
the sum of the differences of the exponentials. Taking the maxima away first keeps float32 exact where the probability is:
``z - lse`` has the rounding of the logits' size, 2e-6 at 30, in every probability.

Infinite logits follow the limits of these formulas. A logit of -inf has probability 0, and ``0 log 0 = 0``. Forward KL is +inf
where p_s = 0 < p_t, and so is the uniform loss where p_s = 0; their gradients stay p_s - p_t. Reverse KL is +inf where
p_t = 0 < p_s; its gradient has no limit, and the row's gradient is NaN. JSD is always finite. A row that holds +inf or NaN, or
nothing but -inf, is no distribution: its loss and its gradient are NaN (its log-sum-exp is -inf in the last case).
For ``renormalize``, nothing but -inf means the known entries; +inf or NaN in any entry spoils the row.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from undo_kernels.pairs import bregman, difference, expm1
from undo_kernels.problem import SPARSE
from undo_kernels.sparse import sparse_terms

_LEAST = -200.0  # p * x is 0 in any dtype before log p gets here; 0 * -inf would be NaN


class RowDivergence(torch.autograd.Function):
    """Divergence of each row, ``[rows]``: ``(z_s, z_t, indices, logprobs, target, beta)``, differentiable in ``z_s``.

    The gradient is the formula above, evaluated in the backward from the same logits, rather than autograd's of the value.
    It can be differentiated again.
    """

    @staticmethod
    def forward(  # argument by argument: Dynamo would take *arguments for the form that begins with ctx
        z_s: torch.Tensor,
        z_t: torch.Tensor | None,
        indices: torch.Tensor | None,
        logprobs: torch.Tensor | None,
        target: str,
        beta: float,
    ) -> torch.Tensor:
        return _terms(z_s, z_t, indices, logprobs, target, beta, gradient=False)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.options = inputs[4:]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        return (grad[:, None] * _terms(*ctx.saved_tensors, *ctx.options, gradient=True), *[None] * 5)


class LogSumExp(torch.autograd.Function):
    """Log-sum-exp of each row, ``[rows]``; NaN, with its gradient, for a row that holds +inf."""

    @staticmethod
    def forward(z: torch.Tensor) -> torch.Tensor:
        lse = torch.logsumexp(z, -1)
        return torch.where(lse == math.inf, math.nan, lse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad[:, None] * torch.softmax(ctx.saved_tensors[0], -1)


def _terms(
    z_s: torch.Tensor,
    z_t: torch.Tensor | None,
    indices: torch.Tensor | None,
    logprobs: torch.Tensor | None,
    target: str,
    beta: float,
    gradient: bool,
) -> torch.Tensor:
    """The divergence, ``[rows]``, or its gradient by ``z_s``, ``[rows, V]``."""
    if target in SPARSE:
        return _sparse(z_s, indices, logprobs, target, gradient)
    return _dense(z_s, z_t, target, beta, gradient)


def _dense(z_s: torch.Tensor, z_t: torch.Tensor, target: str, beta: float, gradient: bool) -> torch.Tensor:
    u, v = z_s - z_s.amax(-1, keepdim=True), z_t - z_t.amax(-1, keepdim=True)
    e_s, e_t = u.exp(), v.exp()
    sum_s, sum_t = e_s.sum(-1, keepdim=True), e_t.sum(-1, keepdim=True)
    x = torch.nan_to_num(
        u - v, nan=0.0, posinf=math.inf, neginf=-math.inf
    )  # two -inf do not differ; a NaN row keeps its sums' NaN
    apart = difference(e_t, e_s, x).sum(-1, keepdim=True) / sum_t
    # Far from zero, log1p(apart) is log1p(-1 + rounding).
    gap = torch.where(apart.abs() < 0.5, torch.log1p(torch.where(apart.abs() < 0.5, apart, 0.0)), (sum_s / sum_t).log())
    x = x - gap
    p_s, p_t = e_s / sum_s, e_t / sum_t
    if target in ("forward", "uniform"):
        return difference(p_t, p_s, x) if gradient else bregman(p_t, p_s, x).sum(-1)
    if target == "reverse":
        kl = bregman(p_s, p_t, -x).sum(-1, keepdim=True)
        return _centred(p_s, x, kl.masked_fill(kl == math.inf, math.nan)) if gradient else kl.squeeze(-1)
    m = beta * p_t + (1 - beta) * p_s
    log_m_s = _log_mixture(-x, math.log1p(-beta), beta)
    from_s = bregman(p_s, m, log_m_s).sum(-1, keepdim=True)
    if gradient:
        return (1 - beta) * _centred(p_s, -log_m_s, from_s)
    from_t = bregman(p_t, m, _log_mixture(x, math.log(beta), 1 - beta)).sum(-1)
    return beta * from_t + (1 - beta) * from_s.squeeze(-1)


def _centred(p: torch.Tensor, x: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """``p * (x - mean)``, where ``mean`` is ``sum p x`` up to its rounding, which the second step takes away."""
    y = x.clamp_min(_LEAST) - mean
    return p * (y - (p * y).sum(-1, keepdim=True))


def _log_mixture(x: torch.Tensor, log_own: float, other: float) -> torch.Tensor:
    """``log((1 - other) + other * e**x)`` without cancellation near ``x = 0`` and without overflow; ``log_own = log(1 - other)``."""
    small = torch.where(x.abs() <= 1, x, 0.0)
    far = torch.logaddexp(torch.full_like(x, log_own), x + math.log(other))
    return torch.where(x.abs() <= 1, torch.log1p(other * expm1(small)), far)


def _sparse(z: torch.Tensor, indices: torch.Tensor, logprobs: torch.Tensor, target: str, gradient: bool) -> torch.Tensor:
    """Only differences of logits matter, so the largest that counts is taken away first, which keeps the log-sum-exps small."""
    safe = indices.clamp_min(0)
    column = torch.where(indices >= 0, indices, z.shape[-1])  # padding marks a column of its own
    taken = torch.zeros(z.shape[0], z.shape[1] + 1, dtype=torch.bool, device=z.device).scatter(-1, column, True)[:, :-1]
    largest = (z.masked_fill(~taken, -math.inf) if target == "renormalize" else z).amax(-1, keepdim=True)
    z = z - torch.where(largest == -math.inf, 0.0, largest)
    rest = z.masked_fill(taken, -math.inf)
    lse_rest = torch.logsumexp(rest, -1)
    terms = sparse_terms(z.gather(-1, safe), indices, logprobs, lse_rest, target, z.shape[-1])
    if not gradient:
        return terms.divergence
    if target == "renormalize":
        others = terms.rest[:, None].expand_as(z)
    else:
        empty = lse_rest == -math.inf
        others = terms.rest[:, None] * (rest - torch.where(empty, 0.0, lse_rest)[:, None]).exp()
    return torch.nn.functional.pad(others, (0, 1)).scatter(-1, column, terms.slope)[:, :-1]
