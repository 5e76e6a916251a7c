"""Divergences between logits, token by token, and their gradients, in a form that does not cancel.

With ``u = z_s - max z_s``, ``v = z_t - max z_t``, ``S = sum e**u``, ``T = sum e**v`` and ``x = log p_s - log p_t``::

    KL(t || s) = sum p_t (expm1(x) - x)          dKL/dz_s = p_t expm1(x) = p_s - p_t
    KL(s || t) = sum p_s (expm1(-x) + x)         dKL/dz_s = p_s (x - KL)
    JSD        = beta KL(t || m) + (1 - beta) KL(s || m),  m = beta t + (1 - beta) s
                                                 dJSD/dz_s = (1 - beta) p_s (log(s / m) - KL(s || m))

Every term is >= 0, and nothing cancels as the two distributions approach each other. All of it needs only one ``expm1`` per
entry, for ``d = e**u - e**v``, computed from ``u - v``. With ``D = sum d = S - T``::

    x         = (u - v) - sign(D) log1p(|D| / min(S, T))
    p_s - p_t = (d - e**v D / T) / S  where D >= 0,  (d - e**u D / S) / T  elsewhere

The maxima are subtracted first, so that probable entries have small u and v with small rounding errors. ``z - lse`` would give
every probability a rounding error in proportion to the size of the logits: 2e-6 at logits of 30.

Infinite logits follow the limits of these formulas. A logit of -inf has probability 0, and ``0 log 0 = 0``. Forward KL is +inf
where p_s = 0 < p_t, and so is the uniform loss where p_s = 0; their gradients stay p_s - p_t. Reverse KL is +inf where
p_t = 0 < p_s; its gradient is undefined there, and the token's gradient is NaN. JSD is always finite. A token that contains +inf or
NaN, or only -inf, is not a distribution: its loss and its gradient are NaN (its log-sum-exp is -inf in the last case). For
``renormalize``, "only -inf" is about the known entries; +inf or NaN in any entry makes the token NaN.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from undo_kernels.kl_terms import bregman, expm1, expm1_
from undo_kernels.problem import SPARSE
from undo_kernels.sparse_kl_terms import sparse_terms

_LEAST = -200.0  # lower bound of log p in p * x, which is already 0 there in every dtype; 0 * -inf would be NaN
_MOST = 1e30  # finite in float32, so that its product with a probability of 0 is 0


class TokenDivergence(torch.autograd.Function):
    """Divergence of each token, ``[tokens]``, from ``(z_s, z_t, indices, logprobs, target, beta)``; differentiable in ``z_s``.

    The forward computes the gradient together with the value, since they share most of the work; the backward multiplies it by
    ``grad``. With ``create_graph=True``, the backward adds the derivative of the plain formula, so it can be differentiated
    again.
    """

    @staticmethod
    def forward(  # takes ctx: with a setup_context torch inspects the signature in every call, which is slow
        ctx: Any,
        z_s: torch.Tensor,
        z_t: torch.Tensor | None,
        indices: torch.Tensor | None,
        logprobs: torch.Tensor | None,
        target: str,
        beta: float,
    ) -> torch.Tensor:
        wanted = ctx.needs_input_grad[0]
        if target in SPARSE:
            value, gradient = sparse(z_s, indices, logprobs, target, wanted)
        else:
            value, gradient = dense(z_s, z_t, target, beta, wanted)
        if wanted:
            ctx.save_for_backward(gradient, z_s, z_t, indices, logprobs)
            ctx.options = target, beta
        return value

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        gradient, z_s, z_t, indices, logprobs = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            target, beta = ctx.options
            if target in SPARSE:
                gradient = sparse(z_s, indices, logprobs, target, True)[1]
            else:
                plain = _differentiable_gradient(z_s, z_t, target, beta)
                gradient = gradient + (plain - plain.detach())
        return grad[:, None] * gradient, None, None, None, None, None


class LogSumExp(torch.autograd.Function):
    """Log-sum-exp of each token, ``[tokens]``; value and gradient are NaN for a token that contains +inf."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor) -> torch.Tensor:
        lse = torch.logsumexp(z, -1)
        ctx.save_for_backward(z)
        return lse.masked_fill(lse == math.inf, math.nan)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad[:, None] * torch.softmax(ctx.saved_tensors[0], -1)


class Whole:
    """Maxima and sums over a vocabulary that this process holds alone; :mod:`undo_kernels.reference.sharded` has the other."""

    def max(self, *columns: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns the maxima over the whole vocabulary, ``[tokens, 1]`` each, from those over the entries of this process."""
        return columns

    def sum(self, *columns: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns the sums over the whole vocabulary, likewise."""
        return columns

    def local(self, indices: torch.Tensor, size: int) -> torch.Tensor:
        """Returns indices into the vocabulary as indices into the ``size`` entries of this process, -1 for others."""
        return indices

    def entries(self, size: int) -> int:
        """Returns the number of entries of the whole vocabulary."""
        return size


WHOLE = Whole()


def dense(
    z_s: torch.Tensor, z_t: torch.Tensor, target: str, beta: float, gradient: bool, over: Whole = WHOLE
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the divergence, ``[tokens]``, and, if ``gradient``, its gradient by ``z_s``, ``[tokens, V]``; not differentiable."""
    m_s, m_t = over.max(largest(z_s), largest(z_t))
    u, v = z_s - m_s, z_t - m_t
    # Two logits of -inf count as equal (-inf - -inf is NaN). A token that is not a distribution still gets NaN from its sums.
    x = torch.sub(u, v).nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)
    e_s, e_t = u.exp_(), v.exp_()
    apart = expm1_(x.abs().neg_()).copysign_(x).mul_(torch.maximum(e_s, e_t))
    sum_s, sum_t, difference = over.sum(e_s.sum(-1, keepdim=True), e_t.sum(-1, keepdim=True), apart.sum(-1, keepdim=True))
    least, most = torch.minimum(sum_s, sum_t), torch.maximum(sum_s, sum_t)
    ratio = difference / least
    x -= torch.copysign(ratio.abs().log1p(), ratio)
    apart /= most
    apart.addcmul_(e_t.expand_as(apart), ratio.clamp_min(0) / most, value=-1)
    apart.addcmul_(e_s, ratio.clamp_max(0) / most, value=-1)  # p_s - p_t
    if target in ("forward", "uniform"):
        x.clamp_max_(_MOST).mul_(e_t.div_(sum_t)).sub_(apart)
        (kl,) = over.sum(x.sum(-1, keepdim=True).neg_().clamp_min_(0))
        return kl.squeeze(-1), apart
    p_s = e_s.div_(sum_s)
    if target == "reverse":
        (kl,) = over.sum((p_s * x.clamp_min(-_MOST)).sub_(apart).sum(-1, keepdim=True).clamp_min_(0))
        return kl.squeeze(-1), _centred(p_s, x, kl.masked_fill(kl == math.inf, math.nan), over) if gradient else None
    p_t = e_t.div_(sum_t)
    m = beta * p_t + (1 - beta) * p_s
    log_m_s = _log_mixture(-x, math.log1p(-beta), beta)
    from_s = bregman(p_s, m, log_m_s).sum(-1, keepdim=True)
    from_t = bregman(p_t, m, _log_mixture(x, math.log(beta), 1 - beta)).sum(-1, keepdim=True)
    from_s, from_t = over.sum(from_s, from_t)
    value = (beta * from_t + (1 - beta) * from_s).squeeze(-1)
    return value, (1 - beta) * _centred(p_s, -log_m_s, from_s, over) if gradient else None


def _differentiable_gradient(z_s: torch.Tensor, z_t: torch.Tensor, target: str, beta: float) -> torch.Tensor:
    """Returns the gradient in a form that autograd can differentiate; less exact where the distributions nearly agree."""
    log_s, log_t = z_s.log_softmax(-1), z_t.log_softmax(-1)
    p_s = log_s.exp()
    if target in ("forward", "uniform"):
        return p_s - log_t.exp()
    other = log_t if target == "reverse" else torch.logaddexp(log_s + math.log1p(-beta), log_t + math.log(beta))
    x = (log_s - other).clamp_min(_LEAST)
    return (1.0 if target == "reverse" else 1 - beta) * p_s * (x - (p_s * x).sum(-1, keepdim=True))


def _centred(p: torch.Tensor, x: torch.Tensor, mean: torch.Tensor, over: Whole) -> torch.Tensor:
    """Returns ``p * (x - mean)``; ``mean`` is ``sum p x``, and the second subtraction corrects its rounding error."""
    y = x.clamp_min(_LEAST) - mean
    # Over several processes the correction would be one more exchange, and ``mean`` is a sum of terms that do not cancel.
    return p * (y - (p * y).sum(-1, keepdim=True)) if over is WHOLE else p * y


def largest(z: torch.Tensor) -> torch.Tensor:
    """Returns each token's largest logit, ``[tokens, 1]``; -inf if there are no logits."""
    return z.amax(-1, keepdim=True) if z.shape[1] else z.new_full((z.shape[0], 1), -math.inf)


def _log_mixture(x: torch.Tensor, log_own: float, other: float) -> torch.Tensor:
    """Returns ``log(1 - other + other * e**x)`` without cancellation or overflow; ``log_own`` is ``log(1 - other)``."""
    small = torch.where(x.abs() <= 1, x, 0.0)
    far = torch.logaddexp(torch.full_like(x, log_own), x + math.log(other))
    return torch.where(x.abs() <= 1, torch.log1p(other * expm1(small)), far)


def sparse(
    z: torch.Tensor, indices: torch.Tensor, logprobs: torch.Tensor, target: str, gradient: bool, over: Whole = WHOLE
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the divergence from a sparse teacher, ``[tokens]``, and if ``gradient`` its gradient, ``[tokens, V]``.

    The largest logit that counts is subtracted first. That changes neither result, and keeps the log-sum-exps small and exact.
    """
    size = z.shape[1]
    local = over.local(indices, size)
    column = torch.where(
        local >= 0, local, size
    )  # padding, and what another process holds, gets an extra column, which is dropped
    taken = torch.zeros(z.shape[0], size + 1, dtype=torch.bool, device=z.device).scatter(-1, column, True)[:, :-1]
    counting = z.masked_fill(~taken, -math.inf) if target == "renormalize" else z
    maxima = over.max(largest(counting), largest(z.masked_fill(taken, -math.inf)))
    most, most_of_rest = (torch.where(m == -math.inf, 0.0, m) for m in maxima)
    z = z - most
    rest = z.masked_fill(taken, -math.inf)
    known = torch.where(local >= 0, z.gather(-1, local.clamp_min(0)), 0.0) if size else z.new_zeros(indices.shape)
    sum_of_rest, *picked = over.sum((rest - (most_of_rest - most)).exp().sum(-1, keepdim=True), *known.split(1, -1))
    lse_rest = (most_of_rest - most + sum_of_rest.log()).squeeze(-1)
    picked = torch.cat(picked, -1) if picked else known
    terms = sparse_terms(picked, indices, logprobs, lse_rest, target, over.entries(size))
    if not gradient:
        return terms.divergence, None
    if target == "renormalize":
        others = terms.rest[:, None].expand_as(z)
    else:
        empty = lse_rest == -math.inf
        others = terms.rest[:, None] * (rest - torch.where(empty, 0.0, lse_rest)[:, None]).exp()
    return terms.divergence, torch.nn.functional.pad(others, (0, 1)).scatter(-1, column, terms.slope)[:, :-1]
