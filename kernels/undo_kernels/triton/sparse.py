"""Forward KL against a teacher known at k entries, from the student's logits there and the log-sum-exp of the rest.

    bucket       outcomes are the k entries and the rest: dKL/dz_v = p_s(v) - p_t(v) at an entry,
                 (P_s(rest) - P_t(rest)) softmax over the rest(v) elsewhere;  log P_t(rest) = log1p(-sum p_t)
    renormalize  outcomes are the k entries: dKL/dz_v = p_s(v) - p_t(v) at an entry with both normalised over them, 0 elsewhere

[rows, k] mathematics in float64, on the device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from undo_kernels.reference.divergence import bregman


class Sparse(NamedTuple):
    """Attributes:
    divergence: ``[rows]``.
    lse: ``[rows]``, over every entry.
    rest: ``[rows]``, d divergence / d z at a vocabulary row v of the rest, over e**(z_v - lse_rest).
    slope: ``[rows, k]``, d divergence / d z at the entries.
    """

    divergence: torch.Tensor
    lse: torch.Tensor
    rest: torch.Tensor
    slope: torch.Tensor


def sparse_terms(
    picked: torch.Tensor, indices: torch.Tensor, logprobs: torch.Tensor, lse_rest: torch.Tensor, target: str
) -> Sparse:
    """Everything that one chunk's gradient needs; ``picked`` are shaped logits, anything where ``indices`` is negative."""
    known = indices >= 0
    nothing = torch.full((), -math.inf, dtype=torch.float64, device=picked.device)
    z = torch.where(known, picked.double(), nothing)
    log_t = torch.where(known, logprobs.double(), nothing)
    lse_known = torch.logsumexp(z, -1)
    lse = torch.logaddexp(lse_rest, lse_known)
    if target == "renormalize":
        log_t = log_t - _or_zero(torch.logsumexp(log_t, -1))[:, None]
        log_s = z - _or_zero(lse_known)[:, None]
    else:
        log_s = z - lse[:, None]
    real = known & (log_t > -math.inf)
    # A teacher's zero leaves the student's share: p_t (expm1(x) - x) and p_t expm1(x) both go to p_s.
    gone = known & ~real
    base, x = torch.where(real, log_t, 0.0), torch.where(real, log_s - log_t, 0.0)
    share = torch.where(gone, log_s.exp(), 0.0)
    value = (torch.where(real, bregman(base, x), 0.0) + share).sum(-1)
    slope = torch.where(real, _difference(base, x), 0.0) + share
    rest = torch.zeros_like(value)
    if target == "bucket":
        has_rest = ~(lse_rest == -math.inf)
        total = torch.where(known, log_t.exp(), 0.0).sum(-1)
        open_ = has_rest & (total < 1)
        log_left = torch.log1p(-torch.where(open_, total, 0.0))
        log_rest = torch.where(has_rest, lse_rest - lse, 0.0)
        left = torch.where(open_, log_left, 0.0)
        gap = torch.where(open_, log_rest - log_left, 0.0)
        all_of_it = torch.where(has_rest, log_rest.exp(), 0.0)
        value = value + torch.where(open_, bregman(left, gap), all_of_it)
        rest = torch.where(open_, _difference(left, gap), all_of_it)
    return Sparse(value, lse, rest, slope)


def _difference(log_p: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``e**(log_p + x) - e**log_p``, from the larger of the two."""
    up = x > 0
    return torch.where(up, -torch.expm1(-x.abs()), torch.expm1(-x.abs())) * (log_p + torch.where(up, x, 0.0)).exp()


def _or_zero(lse: torch.Tensor) -> torch.Tensor:
    return torch.where(lse == -math.inf, 0.0, lse)
