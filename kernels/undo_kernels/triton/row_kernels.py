"""Row kernels over stored logits: the chunk plan's float32 products, or logits given by the caller.

One program processes one part of one row; parts are combined in a fixed order. Cost of each (token, vocabulary row) pair::

    stats_rows   reads 8 bytes (4 without a teacher), two exponentials
    loss_rows    reads 8 bytes, writes the gradient (2 or 4), two exponentials; jsd two logarithms more
    softcaps     two exponentials more in either

Nest an ``if`` on a tensor inside the ``if`` on a constexpr: with ``and``, Triton evaluates both operands.

The gradient may overwrite logits of the same dtype, because each element is read and written by a single program.
"""

import triton
import triton.language as tl

from undo_kernels.triton.math import expm1
from undo_kernels.triton.pair_math import (
    CROSS_S,
    DIFFERENCE,
    ENERGY_T,
    L_S,
    L_T,
    LARGE,
    LOWEST,
    M_S,
    M_T,
    OWN,
    TOP_S,
    TOP_T,
    cut,
    log_difference,
    loss_and_slope,
    narrow,
    rescale_difference,
    shape_logits,
)


@triton.jit
def load_logits(z_ptr, bias_ptr, o_v, keep, inner, outer, HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, HOLES: tl.constexpr):
    """Loads a block of logits and shapes them; -inf past the end and, with HOLES, where an entry was removed."""
    raw = tl.load(z_ptr + o_v, mask=keep, other=0.0).to(tl.float32)
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + o_v, mask=keep, other=0.0).to(tl.float32)
    z = shape_logits(raw, bias, inner, outer, HAS_BIAS, CAPPED)
    if HOLES:
        keep = keep & (raw != float("-inf"))
    return tl.where(keep, z, float("-inf"))


@triton.jit
def stats_rows(
    # logits, biases, which rows count
    z_s_ptr, z_t_ptr, bias_s_ptr, bias_t_ptr, counted_ptr,
    # [FIELDS, rows, parts]
    partial_ptr,
    inner_s, outer_s, inner_t, outer_t,
    vocabulary, part, parts, stride_s, stride_t, stride_field,
    TEACHER: tl.constexpr,  # compute the teacher's sums too
    CROSS: tl.constexpr,  # compute E_s[z_s - z_t], for reverse's gradient; needs TEACHER, like STATISTICS
    STATISTICS: tl.constexpr,  # teacher entropy and both top-1
    BIAS_S: tl.constexpr, CAPPED_S: tl.constexpr, BIAS_T: tl.constexpr, CAPPED_T: tl.constexpr,
    MASKED: tl.constexpr, HOLES: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Computes maximum and sum of exponentials of one part of one row; with a teacher, also the sum of their differences.

    The latter gives the difference of two nearly equal log-sum-exps; subtracting two float32 sums is only accurate to 1e-7.
    """
    i_row = tl.program_id(0).to(tl.int64)
    i_part = tl.program_id(1)
    if MASKED:  # noqa: SIM102
        if tl.load(counted_ptr + i_row) == 0:
            return
    z_s_ptr += i_row * stride_s
    z_t_ptr += i_row * stride_t
    partial_ptr += i_row * parts + i_part
    start = i_part * part
    end = tl.minimum(start + part, vocabulary)

    m_s = tl.full([], LOWEST, tl.float32)
    m_t = tl.full([], LOWEST, tl.float32)
    top_s = tl.full([], -1, tl.int32)
    top_t = tl.full([], -1, tl.int32)
    # One sum per lane: BLOCK_V short sums, added as a tree, have smaller rounding errors than one long sum.
    b_l_s = tl.zeros([BLOCK_V], tl.float32)
    b_l_t = tl.zeros([BLOCK_V], tl.float32)
    b_difference = tl.zeros([BLOCK_V], tl.float32)
    b_cross = tl.zeros([BLOCK_V], tl.float32)
    b_energy = tl.zeros([BLOCK_V], tl.float32)
    for first in range(start, end, BLOCK_V):
        o_v = first + tl.arange(0, BLOCK_V)
        keep = o_v < end
        b_s = load_logits(z_s_ptr, bias_s_ptr, o_v, keep, inner_s, outer_s, BIAS_S, CAPPED_S, HOLES)
        here = tl.max(b_s, 0)
        if STATISTICS:
            top_s = tl.where(here > m_s, tl.min(tl.where(b_s == here, o_v, 2147483647), 0), top_s)
        m_new_s = tl.maximum(m_s, here)
        rescale_s = tl.exp(m_s - m_new_s)
        b_u = b_s - m_new_s
        if TEACHER:
            b_t = load_logits(z_t_ptr, bias_t_ptr, o_v, keep, inner_t, outer_t, BIAS_T, CAPPED_T, False)
            here = tl.max(b_t, 0)
            if STATISTICS:
                top_t = tl.where(here > m_t, tl.min(tl.where(b_t == here, o_v, 2147483647), 0), top_t)
            m_new_t = tl.maximum(m_t, here)
            rescale_t = tl.exp(m_t - m_new_t)
            b_v = b_t - m_new_t
            b_y = b_u - b_v
            up = b_y > 0.0
            b_y = log_difference(b_u, b_v, b_y)
            b_big = tl.exp(tl.where(up, b_u, b_v))
            b_e, b_w, _ = expm1(-tl.abs(b_y))
            b_small = b_big * b_e
            b_e = tl.where(up, b_big, b_small)
            b_g = tl.where(up, b_small, b_big)
            shift = (m_s - m_new_s) - (m_t - m_new_t)
            b_difference = (
                rescale_t * b_difference
                + rescale_difference(rescale_s, rescale_t, shift) * b_l_s
                + b_big * tl.where(up, -b_w, b_w)
            )
            if CROSS:
                b_cross = rescale_s * (b_cross + shift * b_l_s) + b_e * cut(
                    b_y
                )  # +inf where the teacher alone has probability 0
        else:
            b_e = tl.exp(b_u)
        b_l_s = b_l_s * rescale_s + b_e
        m_s = m_new_s
        if TEACHER:
            if STATISTICS:
                # Logits are relative to the maximum, so when it rises by a shift, shift * sum is subtracted.
                b_energy = (b_energy - b_l_t * (m_new_t - m_t)) * rescale_t
                b_energy += b_g * cut(b_v)
            b_l_t = b_l_t * rescale_t + b_g
            m_t = m_new_t
    tl.store(partial_ptr + M_S * stride_field, m_s)
    tl.store(partial_ptr + L_S * stride_field, tl.sum(b_l_s, 0))
    if TEACHER:
        tl.store(partial_ptr + M_T * stride_field, m_t)
        tl.store(partial_ptr + L_T * stride_field, tl.sum(b_l_t, 0))
        tl.store(partial_ptr + DIFFERENCE * stride_field, tl.sum(b_difference, 0))
    if CROSS:
        tl.store(partial_ptr + CROSS_S * stride_field, tl.sum(b_cross, 0))
    if STATISTICS:
        tl.store(partial_ptr + ENERGY_T * stride_field, tl.sum(b_energy, 0))
        tl.store(partial_ptr + TOP_S * stride_field, top_s.to(tl.float32))
        tl.store(partial_ptr + TOP_T * stride_field, top_t.to(tl.float32))


@triton.jit
def combine_rows(
    partial_ptr, counted_ptr, labels_ptr, label_z_ptr, known_s_ptr, known_t_ptr,
    lse_s_ptr, lse_t_ptr, base_s_ptr, base_t_ptr, log_sum_s_ptr, log_sum_t_ptr, gap_ptr, offset_ptr,
    nll_ptr, entropy_ptr, agreement_ptr,
    vocabulary, parts, stride_field,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr, CROSS: tl.constexpr, STATISTICS: tl.constexpr,
    DIFFERENCES: tl.constexpr,  # the parts contain DIFFERENCE
    LESS_ONE: tl.constexpr,  # their sums leave out the largest term, 1
    PAIR: tl.constexpr,  # there is a teacher, given by sums, by known_t, or UNIFORM
    UNIFORM: tl.constexpr, NLL: tl.constexpr, LABELS: tl.constexpr, MASKED: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Combines the parts of one row into log-sum-exps and values derived from them, in float64; 0 for an uncounted row.

    It also stores base and logarithm of the sum separately, and the difference of the two logarithms: the difference of two
    rounded log-sum-exps of 20 would be wrong by 2e-6.
    """
    i_row = tl.program_id(0).to(tl.int64)
    zero = tl.full([], 0.0, tl.float64)
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
    if MASKED:
        counts = tl.load(counted_ptr + i_row) != 0
    if counts:
        o_p = tl.arange(0, BLOCK_P)
        keep = o_p < parts
        partial_ptr += i_row * parts
        if STUDENT:
            b_m = tl.load(partial_ptr + M_S * stride_field + o_p, mask=keep, other=LOWEST)
            m_s = tl.max(b_m, 0)
            b_shift_s = b_m.to(tl.float64) - m_s.to(tl.float64)
            b_rescale_s = tl.exp(b_shift_s)
            b_l_s = tl.load(partial_ptr + L_S * stride_field + o_p, mask=keep, other=0.0).to(tl.float64)
            if LESS_ONE:
                b_l_s += 1.0
            l_s = tl.sum(b_l_s * b_rescale_s, 0)
            base_s = m_s.to(tl.float64)
            log_sum_s = tl.log(l_s)
            if STATISTICS:
                b_top = tl.load(partial_ptr + TOP_S * stride_field + o_p, mask=keep, other=0.0)
                top_s = tl.min(tl.where(keep & (b_m == m_s), b_top, LARGE), 0)
        else:
            base_s = tl.load(known_s_ptr + i_row).to(tl.float64)
        if UNIFORM:
            log_sum_t = tl.log(zero + vocabulary)
        elif TEACHER:
            b_m = tl.load(partial_ptr + M_T * stride_field + o_p, mask=keep, other=LOWEST)
            m_t = tl.max(b_m, 0)
            b_shift = b_m.to(tl.float64) - m_t.to(tl.float64)
            b_rescale = tl.exp(b_shift)
            b_l = tl.load(partial_ptr + L_T * stride_field + o_p, mask=keep, other=0.0).to(tl.float64)
            if LESS_ONE:
                b_l += 1.0
            b_l *= b_rescale
            l_t = tl.sum(b_l, 0)
            base_t = m_t.to(tl.float64)
            log_sum_t = tl.log(l_t)
            if STATISTICS:
                b_energy = tl.load(partial_ptr + ENERGY_T * stride_field + o_p, mask=keep, other=0.0).to(tl.float64)
                energy = tl.sum(b_energy * b_rescale + tl.where(b_l > 0.0, b_l * b_shift, 0.0), 0)
                entropy = tl.log(l_t) - energy / l_t
                b_top = tl.load(partial_ptr + TOP_T * stride_field + o_p, mask=keep, other=0.0)
                top_t = tl.min(tl.where(keep & (b_m == m_t), b_top, LARGE), 0)
                agreement = tl.where(top_s == top_t, 1.0, 0.0).to(tl.float64)
        elif PAIR:
            base_t = tl.load(known_t_ptr + i_row).to(tl.float64)
        lse_s = base_s + log_sum_s
        lse_t = base_t + log_sum_t
        gap = log_sum_s - log_sum_t
        if DIFFERENCES:
            b_difference = tl.load(partial_ptr + DIFFERENCE * stride_field + o_p, mask=keep, other=0.0).to(tl.float64)
            ratio = tl.sum(b_rescale * b_difference + (b_rescale_s - b_rescale) * b_l_s, 0) / l_t
            # From the differences only near zero; far from it, log1p would amplify the rounding error of a ratio near -1.
            near = tl.abs(ratio) < 0.5
            small = tl.where(near, ratio, 0.0)
            sum_ = 1.0 + small
            log1p_ = tl.where(sum_ == 1.0, small, tl.log(sum_) * small / tl.where(sum_ == 1.0, 1.0, sum_ - 1.0))
            gap = tl.where(near, log1p_, gap)
        if CROSS:
            b_cross = tl.load(partial_ptr + CROSS_S * stride_field + o_p, mask=keep, other=0.0).to(tl.float64)
            offset = tl.sum(b_rescale_s * (b_cross + (b_shift_s - b_shift) * b_l_s), 0) / l_s - gap
            offset = tl.where(offset < 0.0, 0.0, offset)
            offset = tl.where(offset == float("inf"), float("nan"), offset)  # the gradient is undefined where KL is infinite
        if NLL:
            nll = lse_s
            if LABELS:
                label_z = tl.load(label_z_ptr + i_row).to(tl.float64)
                nll = tl.where(tl.load(labels_ptr + i_row) < 0, lse_s, lse_s - label_z)
    tl.store(lse_s_ptr + i_row, lse_s.to(lse_s_ptr.dtype.element_ty))
    tl.store(base_s_ptr + i_row, base_s.to(tl.float32))
    tl.store(log_sum_s_ptr + i_row, log_sum_s.to(tl.float32))
    if PAIR:
        tl.store(lse_t_ptr + i_row, lse_t.to(tl.float32))
        tl.store(base_t_ptr + i_row, base_t.to(tl.float32))
        tl.store(log_sum_t_ptr + i_row, log_sum_t.to(tl.float32))
        tl.store(gap_ptr + i_row, gap.to(tl.float32))
    if CROSS:
        tl.store(offset_ptr + i_row, offset.to(tl.float32))
    if NLL:
        tl.store(nll_ptr + i_row, nll.to(nll_ptr.dtype.element_ty))
    if STATISTICS:
        tl.store(entropy_ptr + i_row, entropy.to(tl.float32))
        tl.store(agreement_ptr + i_row, agreement.to(tl.float32))


@triton.jit
def loss_rows(
    z_s_ptr, z_t_ptr, bias_s_ptr, bias_t_ptr, counted_ptr,
    base_s_ptr, base_t_ptr, log_sum_s_ptr, log_sum_t_ptr, gap_ptr, offset_ptr,
    # [rows]: factors of the divergence's gradient and of p_s; the nll's whole gradient at the label
    factor_ptr, own_ptr, at_label_ptr, labels_ptr,
    dz_ptr,
    # [4, rows, parts]: divergence, KL(s||m), skipped entries, sum of their squares
    partial_ptr,
    inner_s, outer_s, inner_t, outer_t, beta_t, beta_s, filter_below,
    vocabulary, columns, part, parts, stride_s, stride_t, stride_dz, stride_field,
    TARGET: tl.constexpr, UNIFORM: tl.constexpr,
    GRADIENT: tl.constexpr,
    NLL: tl.constexpr,  # a multiple of p_s is added
    LABELS: tl.constexpr, FILTER: tl.constexpr,
    BIAS_S: tl.constexpr, CAPPED_S: tl.constexpr, BIAS_T: tl.constexpr, CAPPED_T: tl.constexpr,
    MASKED: tl.constexpr, HOLES: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Computes the divergence of one part of one row and d total / d product; zeros columns ``vocabulary`` to ``columns``."""
    i_row = tl.program_id(0).to(tl.int64)
    i_part = tl.program_id(1)
    z_s_ptr += i_row * stride_s
    z_t_ptr += i_row * stride_t
    dz_ptr += i_row * stride_dz
    partial_ptr += i_row * parts + i_part
    start = i_part * part
    end = tl.minimum(start + part, vocabulary)
    counts = True
    if MASKED:
        counts = tl.load(counted_ptr + i_row) != 0

    b_value = tl.zeros([BLOCK_V], tl.float32)
    b_mixed = tl.zeros([BLOCK_V], tl.float32)
    b_squares = tl.zeros([BLOCK_V], tl.float32)
    skipped = tl.full([], 0.0, tl.float32)
    if counts:
        base_s = tl.load(base_s_ptr + i_row)
        log_sum_s = tl.load(log_sum_s_ptr + i_row)
        base_t = 0.0
        log_sum_t = 0.0
        gap = 0.0
        offset = 0.0
        factor = 0.0
        if TARGET != OWN:
            base_t = tl.load(base_t_ptr + i_row)
            log_sum_t = tl.load(log_sum_t_ptr + i_row)
            gap = tl.load(gap_ptr + i_row)
            offset = tl.load(offset_ptr + i_row)
            if GRADIENT:
                factor = tl.load(factor_ptr + i_row)
        if NLL:
            own = tl.load(own_ptr + i_row)
        if LABELS:
            label = tl.load(labels_ptr + i_row)
            at_label = tl.load(at_label_ptr + i_row)
        for first in range(start, end, BLOCK_V):
            o_v = first + tl.arange(0, BLOCK_V)
            keep = o_v < end
            b_s = load_logits(z_s_ptr, bias_s_ptr, o_v, keep, inner_s, outer_s, BIAS_S, CAPPED_S, HOLES)
            if TARGET == OWN or UNIFORM:
                b_t = b_s * 0.0
                b_t = tl.where(keep, 0.0, b_t)
            else:
                b_t = load_logits(z_t_ptr, bias_t_ptr, o_v, keep, inner_t, outer_t, BIAS_T, CAPPED_T, False)
            value, mixed, b_p, b_g = loss_and_slope(
                b_s, b_t, base_s, base_t, log_sum_s, log_sum_t, gap, offset, beta_t, beta_s, TARGET
            )
            if TARGET != OWN:
                b_value += tl.where(keep, value, 0.0)
                b_mixed += tl.where(keep, mixed, 0.0)
            if GRADIENT:
                b_test = b_p if TARGET == OWN else b_g
                b_out = b_g * factor
                loud = tl.max(tl.where(keep & ~(tl.abs(b_test) < filter_below), 1, 0), 0)  # NaN counts as large
                if NLL:
                    b_own = own * b_p
                    if LABELS:
                        b_own = tl.where(o_v == label, at_label, b_own)
                        loud = tl.where((label >= first) & (label < first + BLOCK_V), 1, loud)
                    b_out += b_own
                if CAPPED_S:
                    b_tanh = b_s / outer_s
                    if HOLES:
                        b_tanh = tl.where(b_s == float("-inf"), 0.0, b_tanh)  # b_out is 0 there
                    b_out *= 1.0 - b_tanh * b_tanh
                if FILTER:
                    b_squares += tl.where(keep & (loud == 0), b_out * b_out, 0.0)
                    skipped += tl.where(loud == 0, tl.minimum(BLOCK_V, end - first).to(tl.float32), 0.0)
                    b_out = tl.where(loud == 0, 0.0, b_out)
                tl.store(dz_ptr + o_v, narrow(b_out, dz_ptr), mask=keep)
    elif GRADIENT:
        for first in range(start, end, BLOCK_V):
            o_v = first + tl.arange(0, BLOCK_V)
            tl.store(dz_ptr + o_v, tl.zeros([BLOCK_V], dz_ptr.dtype.element_ty), mask=o_v < end)
    if GRADIENT:  # noqa: SIM102
        if i_part == 0:
            for first in range(vocabulary, columns, BLOCK_V):
                o_v = first + tl.arange(0, BLOCK_V)
                tl.store(dz_ptr + o_v, tl.zeros([BLOCK_V], dz_ptr.dtype.element_ty), mask=o_v < columns)
    if TARGET != OWN:
        tl.store(partial_ptr, tl.sum(b_value, 0))
        tl.store(partial_ptr + stride_field, tl.sum(b_mixed, 0))
    if FILTER:
        tl.store(partial_ptr + 2 * stride_field, skipped)
        tl.store(partial_ptr + 3 * stride_field, tl.sum(b_squares, 0))


@triton.jit
def pick_rows(
    z_ptr, bias_ptr, index_ptr, counted_ptr, out_ptr,
    inner, outer, vocabulary, known, stride_z,
    HAS_BIAS: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr,
    TAKE: tl.constexpr,  # replace the logits by -inf
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gathers shaped logits of one row at ``index[known]``; -inf for a negative index, NaN for one past the vocabulary."""
    i_row = tl.program_id(0).to(tl.int64)
    if MASKED:  # noqa: SIM102
        if tl.load(counted_ptr + i_row) == 0:
            return
    z_ptr += i_row * stride_z
    o_k = tl.arange(0, BLOCK_K)
    within = o_k < known
    b_at = tl.load(index_ptr + i_row * known + o_k, mask=within, other=-1)
    real = within & (b_at >= 0) & (b_at < vocabulary)
    b_raw = tl.load(z_ptr + b_at, mask=real, other=0.0).to(tl.float32)
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + b_at, mask=real, other=0.0).to(tl.float32)
    b_z = shape_logits(b_raw, bias, inner, outer, HAS_BIAS, CAPPED)
    b_z = tl.where(b_at < 0, float("-inf"), tl.where(b_at >= vocabulary, float("nan"), b_z))
    tl.store(out_ptr + i_row * known + o_k, b_z, mask=within)
    if TAKE:
        tl.store(z_ptr + b_at, tl.full([BLOCK_K], float("-inf"), tl.float32), mask=real)


@triton.jit
def put_rows(
    dz_ptr, index_ptr, value_ptr, counted_ptr, vocabulary, known, stride_dz, MASKED: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Writes the gradients at a sparse teacher's entries into one row."""
    i_row = tl.program_id(0).to(tl.int64)
    if MASKED:  # noqa: SIM102
        if tl.load(counted_ptr + i_row) == 0:
            return
    o_k = tl.arange(0, BLOCK_K)
    b_at = tl.load(index_ptr + i_row * known + o_k, mask=o_k < known, other=-1)
    real = (b_at >= 0) & (b_at < vocabulary)
    b_value = tl.load(value_ptr + i_row * known + o_k, mask=real, other=0.0)
    tl.store(dz_ptr + i_row * stride_dz + b_at, narrow(b_value, dz_ptr), mask=real)
