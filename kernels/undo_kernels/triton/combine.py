"""Combines the partial sums of one token's logits, in a fixed order and in float64; see ``pair_math.py`` for units."""

import triton
import triton.language as tl

from undo_kernels.triton.math import LN2
from undo_kernels.triton.pair_math import CROSS_S, DIFFERENCE, ENERGY_T, L_S, L_T, LARGE, LOWEST, M_S, M_T, TOP_S, TOP_T


@triton.jit
def load_field(partial_ptr, field: tl.constexpr, split, o_p, otherwise: tl.constexpr):
    """Loads a partial sum of every part of one token."""
    return tl.load(partial_ptr + field * split.stride_field + o_p, mask=o_p < split.parts, other=otherwise)


@triton.jit
def combine_side(partial_ptr, split, o_p, unit, M: tl.constexpr, L: tl.constexpr, LESS_ONE: tl.constexpr):
    """Combines one side's maxima and sums of exponentials, in float64.

    Returns the parts' maxima and their maximum, in float32 and units; and the parts' sums, each part's maximum less the whole
    one, and the exponential of that.
    """
    b_m = load_field(partial_ptr, M, split, o_p, LOWEST)
    m = tl.max(b_m, 0)
    b_shift = unit * (b_m.to(tl.float64) - m.to(tl.float64))
    b_rescale = tl.exp(b_shift)
    b_l = load_field(partial_ptr, L, split, o_p, 0.0).to(tl.float64)
    if LESS_ONE:
        b_l += 1.0
    return b_m, m, b_l, b_shift, b_rescale


@triton.jit
def combine_top(partial_ptr, split, o_p, field: tl.constexpr, b_m, m):
    """Returns the first vocabulary entry with the largest logit."""
    b_top = load_field(partial_ptr, field, split, o_p, 0.0)
    return tl.min(tl.where((o_p < split.parts) & (b_m == m), b_top, LARGE), 0)


@triton.jit
def gap_of_sums(ratio, gap):
    """Returns ``log(1 + ratio)`` near 0 and ``gap`` far from it, where log1p would amplify the error of a ratio near -1."""
    near = tl.abs(ratio) < 0.5
    small = tl.where(near, ratio, 0.0)
    sum_ = 1.0 + small
    log1p_ = tl.where(sum_ == 1.0, small, tl.log(sum_) * small / tl.where(sum_ == 1.0, 1.0, sum_ - 1.0))
    return tl.where(near, log1p_, gap)


@triton.jit
def combine_rows(split, known, sums, out, form, BLOCK_P: tl.constexpr):
    """Combines the parts of one token into log-sum-exps and values derived from them, in float64; 0 for an uncounted token.

    It also stores base and logarithm of the sum separately, in the units of the logits, and the difference of the two logarithms: the difference of two
    rounded log-sum-exps of 20 would be wrong by 2e-6.
    """
    i_token = tl.program_id(0).to(tl.int64)
    zero = tl.full([], 0.0, tl.float64)
    unit = tl.full([], 1.0, tl.float64)
    if form.FAST:
        unit = tl.full([], LN2, tl.float64)
    lse_s = zero
    lse_t = zero
    base_s = zero
    base_t = zero
    log_sum_s = zero
    log_sum_t = zero
    gap = zero
    offset = zero
    nll = zero
    entropy = zero
    agreement = zero
    counts = True
    if form.MASKED:
        counts = tl.load(known.counted_ptr + i_token) != 0
    if counts:
        o_p = tl.arange(0, BLOCK_P)
        partial_ptr = split.partial_ptr + i_token * split.parts
        if form.STUDENT:
            b_m_s, m_s, b_l_s, b_shift_s, b_rescale_s = combine_side(partial_ptr, split, o_p, unit, M_S, L_S, form.LESS_ONE)
            l_s = tl.sum(b_l_s * b_rescale_s, 0)
            base_s = unit * m_s.to(tl.float64)
            log_sum_s = tl.log(l_s)
        else:
            base_s = tl.load(known.lse_s_ptr + i_token).to(tl.float64)
        if form.UNIFORM:
            log_sum_t = tl.log(zero + split.vocabulary)
        elif form.TEACHER:
            b_m_t, m_t, b_l_t, b_shift, b_rescale = combine_side(partial_ptr, split, o_p, unit, M_T, L_T, form.LESS_ONE)
            b_l_t *= b_rescale
            l_t = tl.sum(b_l_t, 0)
            base_t = unit * m_t.to(tl.float64)
            log_sum_t = tl.log(l_t)
            if form.STATISTICS:
                b_energy = unit * load_field(partial_ptr, ENERGY_T, split, o_p, 0.0).to(tl.float64)
                energy = tl.sum(b_energy * b_rescale + tl.where(b_l_t > 0.0, b_l_t * b_shift, 0.0), 0)
                entropy = tl.log(l_t) - energy / l_t
                top_s = combine_top(partial_ptr, split, o_p, TOP_S, b_m_s, m_s)
                top_t = combine_top(partial_ptr, split, o_p, TOP_T, b_m_t, m_t)
                agreement = tl.where(top_s == top_t, 1.0, 0.0).to(tl.float64)
        elif form.PAIR:
            base_t = tl.load(known.lse_t_ptr + i_token).to(tl.float64)
        lse_s = base_s + log_sum_s
        lse_t = base_t + log_sum_t
        gap = log_sum_s - log_sum_t
        if form.DIFFERENCES:
            b_difference = load_field(partial_ptr, DIFFERENCE, split, o_p, 0.0).to(tl.float64)
            ratio = tl.sum(b_rescale * b_difference + (b_rescale_s - b_rescale) * b_l_s, 0) / l_t
            gap = gap_of_sums(ratio, gap)
        if form.CROSS:
            b_cross = unit * load_field(partial_ptr, CROSS_S, split, o_p, 0.0).to(tl.float64)
            offset = tl.sum(b_rescale_s * (b_cross + (b_shift_s - b_shift) * b_l_s), 0) / l_s - gap
            offset = tl.where(offset < 0.0, 0.0, offset)
            offset = tl.where(offset == float("inf"), float("nan"), offset)  # the gradient is undefined where KL is infinite
        if form.NLL:
            nll = lse_s
            if form.LABELS:
                label_z = tl.load(known.label_z_ptr + i_token).to(tl.float64)
                nll = tl.where(tl.load(known.labels_ptr + i_token) < 0, lse_s, lse_s - label_z)
    tl.store(out.lse_s_ptr + i_token, lse_s.to(out.lse_s_ptr.dtype.element_ty))
    tl.store(sums.base_s_ptr + i_token, (base_s / unit).to(tl.float32))
    tl.store(sums.log_sum_s_ptr + i_token, (log_sum_s / unit).to(tl.float32))
    if form.PAIR:
        tl.store(out.lse_t_ptr + i_token, lse_t.to(tl.float32))
        tl.store(sums.base_t_ptr + i_token, (base_t / unit).to(tl.float32))
        tl.store(sums.log_sum_t_ptr + i_token, (log_sum_t / unit).to(tl.float32))
        tl.store(sums.gap_ptr + i_token, (gap / unit).to(tl.float32))
    if form.CROSS:
        tl.store(sums.offset_ptr + i_token, offset.to(tl.float32))
    if form.NLL:
        tl.store(out.nll_ptr + i_token, nll.to(out.nll_ptr.dtype.element_ty))
    if form.STATISTICS:
        tl.store(out.entropy_ptr + i_token, entropy.to(tl.float32))
        tl.store(out.agreement_ptr + i_token, agreement.to(tl.float32))
