"""Forward KL against a teacher known at k vocabulary entries, from the student's logits there and the log-sum-exp of its
other logits.

The rest are the vocabulary entries other than the k known ones. The two targets::

    bucket       outcomes are the k entries and the rest as one: dKL/dz_v = p_s(v) - p_t(v) at a known entry,
                 (P_s(rest) - P_t(rest)) softmax over the rest(v) elsewhere;  log P_t(rest) = log1p(-sum p_t)
    renormalize  outcomes are the k entries: dKL/dz_v = p_s(v) - p_t(v) at a known entry, both normalised over the k entries;
                 0 elsewhere

Every backend calls this. It computes ``[tokens, k]`` tensors on the device, in the dtype of ``picked``; the fused backends pass
float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from undo_kernels.kl_terms import bregman, difference, log_ratio


class Sparse(NamedTuple):
    """Divergence against a sparse teacher, and its gradient with respect to the student's logits.

    Attributes:
        divergence: ``[tokens]``.
        lse: ``[tokens]``, the student's log-sum-exp over the whole vocabulary.
        rest: ``[tokens]``, the gradient of the rest as one outcome: d divergence / d z_v is ``rest * e**(z_v - lse_rest)`` for
            each entry v of the rest.
        slope: ``[tokens, k]``, d divergence / d z at the known entries.
    """

    divergence: torch.Tensor
    lse: torch.Tensor
    rest: torch.Tensor
    slope: torch.Tensor


def sparse_terms(
    picked: torch.Tensor, indices: torch.Tensor, logprobs: torch.Tensor, lse_rest: torch.Tensor, target: str, vocabulary: int
) -> Sparse:
    """Computes the divergence of each token and its gradient with respect to the student's logits.

    Args:
        picked: ``[tokens, k]`` student logits after scale, softcap and temperature; ignored where ``indices`` is negative.
        indices: ``[tokens, k]``; negative for padding.
        logprobs: ``[tokens, k]``, the teacher's log-probabilities.
        lse_rest: ``[tokens]``, log-sum-exp of the student's other logits; -inf if all of them are -inf or there are none. The
            rest's gradient then cannot be divided among its entries, and the caller takes it as 0.
        target: bucket or renormalize.
        vocabulary: number of vocabulary entries.
    """
    known = indices >= 0
    nothing = torch.full((), -math.inf, dtype=picked.dtype, device=picked.device)
    z = torch.where(known, picked, nothing)
    log_t = torch.where(known, logprobs.to(picked.dtype), nothing)
    lse_known = torch.logsumexp(z, -1)
    lse_known = torch.where(lse_known == math.inf, math.nan, lse_known)  # +inf among the logits: not a distribution
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
    else:  # the rest does not enter the loss, but +inf or NaN there still makes the token invalid
        spoilt = ~(lse_rest < math.inf) | (known.any(-1) & ~lse_known.isfinite())
        value, rest = value.masked_fill(spoilt, math.nan), rest.masked_fill(spoilt, math.nan)
        slope = slope.masked_fill(spoilt[:, None], math.nan)
    return Sparse(value, lse, rest, slope)
