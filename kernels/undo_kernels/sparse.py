"""Forward KL against a teacher known at k entries, from the student's logits there and the log-sum-exp of the rest.

    bucket       outcomes are the k entries and the rest: dKL/dz_v = p_s(v) - p_t(v) at an entry,
                 (P_s(rest) - P_t(rest)) softmax over the rest(v) elsewhere;  log P_t(rest) = log1p(-sum p_t)
    renormalize  outcomes are the k entries: dKL/dz_v = p_s(v) - p_t(v) at an entry with both normalised over them, 0 elsewhere

Every backend calls this; it is [rows, k] mathematics on the device, in the dtype of ``picked``. The fused backends give float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from undo_kernels.pairs import bregman, difference, log_ratio


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
    picked: torch.Tensor, indices: torch.Tensor, logprobs: torch.Tensor, lse_rest: torch.Tensor, target: str, vocabulary: int
) -> Sparse:
    """Everything that the loss and the gradient of some rows need.

    Args:
        picked: ``[rows, k]`` shaped logits, anything where ``indices`` is negative.
        indices: ``[rows, k]``; negative for padding.
        logprobs: ``[rows, k]`` of the teacher.
        lse_rest: ``[rows]``, log-sum-exp of the student's other logits; -inf where each of them is, or there is none. In that case
            the rest's gradient cannot be divided among its entries, and the caller takes it as 0.
        target: bucket or renormalize.
        vocabulary: number of entries, known or not.
    """
    known = indices >= 0
    nothing = torch.full((), -math.inf, dtype=picked.dtype, device=picked.device)
    z = torch.where(known, picked, nothing)
    log_t = torch.where(known, logprobs.to(picked.dtype), nothing)
    lse_known = torch.logsumexp(z, -1)
    lse_known = torch.where(lse_known == math.inf, math.nan, lse_known)  # no distribution
    lse = torch.logaddexp(lse_rest, lse_known)
    if target == "renormalize":
        log_t = torch.where(known, log_t - torch.logsumexp(log_t, -1, keepdim=True), nothing)
    log_s = torch.where(known, z - (lse_known if target == "renormalize" else lse)[:, None], nothing)
    p_t, p_s, x = log_t.exp(), log_s.exp(), log_ratio(log_s, log_t)
    value = bregman(p_t, p_s, x).sum(-1)
    slope = difference(p_t, p_s, x)
    rest = torch.zeros_like(value)
    if target == "bucket":
        has_rest = known.sum(-1) < vocabulary
        total = p_t.sum(-1)
        open_ = has_rest & (total < 1)
        log_left = torch.where(open_, torch.log1p(-torch.where(open_, total, 0.0)), nothing)
        log_rest = torch.where(has_rest, lse_rest - lse, nothing)
        p_left, p_rest, x = log_left.exp(), log_rest.exp(), log_ratio(log_rest, log_left)
        value = value + bregman(p_left, p_rest, x)
        rest = difference(p_left, p_rest, x)
    else:  # the rest takes no part, but it says whether the row is a distribution
        spoilt = ~(lse_rest < math.inf) | (known.any(-1) & ~lse_known.isfinite())
        value, rest = value.masked_fill(spoilt, math.nan), rest.masked_fill(spoilt, math.nan)
        slope = slope.masked_fill(spoilt[:, None], math.nan)
    return Sparse(value, lse, rest, slope)
