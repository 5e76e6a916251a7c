"""Divergences between two rows of logits, in difference form.

With ``x = (z_s - z_t) - (lse_s - lse_t) = log p_s - log p_t``::

    KL(t || s) = sum p_t * (expm1(x) - x)          dKL/dz_s = p_t * expm1(x)
    KL(s || t) = sum p_s * (expm1(-x) + x)
    JSD        = beta * KL(t || m) + (1 - beta) * KL(s || m),   m = beta * t + (1 - beta) * s

Every term is >= 0, and nothing cancels as the two distributions approach each other, where ``sum p_t (log p_t - log p_s)`` is noise.
"""

from __future__ import annotations

import math

import torch


def bregman(log_p: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``exp(log_p) * (expm1(x) - x)`` elementwise: the terms of ``KL(p || q)`` with ``x = log q - log p``.

    Where ``|x| > 1`` the exponentials are taken apart, ``exp(log_p + x) - exp(log_p) * (1 + x)``: there is no cancellation
    there, and ``expm1`` would overflow (x > 88) or meet ``p = 0`` as ``0 * inf``.
    """
    near = x.abs() <= 1
    small = torch.where(near, x, torch.zeros_like(x))  # both branches stay finite, so neither poisons the gradient
    p = log_p.exp()
    large = (log_p + x).exp() - torch.where(p > 0, p * (1 + x), torch.zeros_like(p))
    return torch.where(near, p * (torch.expm1(small) - small), large)


def divergence_rows(
    z_s: torch.Tensor, z_t: torch.Tensor, lse_s: torch.Tensor, lse_t: torch.Tensor, divergence: str, beta: float
) -> torch.Tensor:
    """Divergence of each row, ``[rows]``, from ``[rows, V]`` logits and ``[rows]`` log-sum-exps."""
    log_t = z_t - lse_t[:, None]
    log_s = z_s - lse_s[:, None]
    x = (z_s - z_t) - (lse_s - lse_t)[:, None]
    if divergence == "forward":
        return bregman(log_t, x).sum(-1)
    if divergence == "reverse":
        return bregman(log_s, -x).sum(-1)
    to_mixture_from_t = _log_mixture(x, math.log(beta), 1 - beta)
    to_mixture_from_s = _log_mixture(-x, math.log1p(-beta), beta)
    return (beta * bregman(log_t, to_mixture_from_t) + (1 - beta) * bregman(log_s, to_mixture_from_s)).sum(-1)


def _log_mixture(x: torch.Tensor, log_own: float, other: float) -> torch.Tensor:
    """``log((1 - other) + other * e**x)`` without cancellation near ``x = 0`` and without overflow; ``log_own = log(1 - other)``."""
    near = x.abs() <= 1
    small = torch.where(near, x, torch.zeros_like(x))
    far = torch.logaddexp(torch.full_like(x, log_own), x + math.log(other))
    return torch.where(near, torch.log1p(other * torch.expm1(small)), far)


def sparse_rows(z: torch.Tensor, indices: torch.Tensor, logprobs: torch.Tensor, tail: str) -> torch.Tensor:
    """Forward KL of each row, ``[rows]``, against a teacher known at ``k`` entries; index -1 is padding.

    bucket: what the teacher leaves, ``log1p(-sum p)``, is one more outcome, and the student's is the log-sum-exp of the rest.
    renormalize: both are taken as distributions over the known entries.
    """
    real = indices >= 0
    safe = indices.clamp_min(0)
    log_t = logprobs.to(z.dtype)
    picked = z.gather(-1, safe)
    if tail == "renormalize":
        log_t = log_t - _logsumexp_where(log_t, real)
        log_s = picked - _logsumexp_where(picked, real)
        return torch.where(real, bregman(*_apart(log_t, log_s, real)), torch.zeros_like(log_t)).sum(-1)
    lse = torch.logsumexp(z, -1, keepdim=True)
    terms = torch.where(real, bregman(*_apart(log_t, picked - lse, real)), torch.zeros_like(log_t)).sum(-1)
    column = torch.where(real, safe, z.shape[-1])  # padding marks a column of its own
    taken = torch.zeros(z.shape[0], z.shape[1] + 1, dtype=torch.bool, device=z.device).scatter_(-1, column, True)[:, :-1]
    has_rest = ~taken.all(-1, keepdim=True)
    log_rest = _logsumexp_where(z, ~taken) - lse
    known = torch.where(real, log_t, torch.full_like(log_t, -math.inf)).exp().sum(-1, keepdim=True)
    open_ = has_rest & (known < 1)
    left = torch.log1p(-torch.where(open_, known, torch.zeros_like(known)))
    rest = bregman(*_apart(left, log_rest, open_))
    # As the teacher's share of the rest goes to 0, p * (expm1(x) - x) goes to the student's share.
    rest = torch.where(open_, rest, torch.where(has_rest, log_rest.exp(), torch.zeros_like(rest)))
    return terms + rest.squeeze(-1)


def _apart(log_p: torch.Tensor, log_q: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``log_p`` and ``log_q - log_p``, zero where not kept, so that what is dropped has finite gradients."""
    zero = torch.zeros_like(log_p)
    return torch.where(keep, log_p, zero), torch.where(keep, log_q - log_p, zero)


def _logsumexp_where(z: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Log-sum-exp over the kept entries, ``[rows, 1]``; 0 with zero gradient for a row that keeps none."""
    none = ~keep.any(-1, keepdim=True)
    return torch.where(none, 0.0, torch.logsumexp(torch.where(keep | none, z, torch.full_like(z, -math.inf)), -1, keepdim=True))
