"""Row kernels over stored logits: the chunk plan's float32 products, or logits given by the caller.

One program processes one part of the logits of one token; parts are combined in a fixed order. Cost of each (token, vocabulary
entry) pair::

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
def load_logits(z_ptr, side, o_v, keep, HOLES: tl.constexpr):
    """Loads a block of one token's logits and shapes them; -inf past the end and, with HOLES, where an entry was removed."""
    raw = tl.load(z_ptr + o_v, mask=keep, other=0.0).to(tl.float32)
    bias = 0.0
    if side.HAS_BIAS:
        bias = tl.load(side.bias_ptr + o_v, mask=keep, other=0.0).to(tl.float32)
    z = shape_logits(raw, bias, side.inner, side.outer, side.HAS_BIAS, side.CAPPED)
    if HOLES:
        keep = keep & (raw != float("-inf"))
    return tl.where(keep, z, float("-inf"))


@triton.jit
def stats_rows(
    student, teacher, split, counted_ptr,
    TEACHER: tl.constexpr, CROSS: tl.constexpr, STATISTICS: tl.constexpr, MASKED: tl.constexpr,  # see StatsForm
    HOLES: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Computes maximum and sum of exponentials of one part of one token; with a teacher, also the sum of their differences.

    The latter gives the difference of two nearly equal log-sum-exps; subtracting two float32 sums is only accurate to 1e-7.
    """
    i_token = tl.program_id(0).to(tl.int64)
    i_part = tl.program_id(1)
    if MASKED:  # noqa: SIM102
        if tl.load(counted_ptr + i_token) == 0:
            return
    z_s_ptr = student.z_ptr + i_token * student.stride
    z_t_ptr = teacher.z_ptr + i_token * teacher.stride
    partial_ptr = split.partial_ptr + i_token * split.parts + i_part
    start = i_part * split.part
    end = tl.minimum(start + split.part, split.vocabulary)

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
        b_s = load_logits(z_s_ptr, student, o_v, keep, HOLES)
        here = tl.max(b_s, 0)
        if STATISTICS:
            top_s = tl.where(here > m_s, tl.min(tl.where(b_s == here, o_v, 2147483647), 0), top_s)
        m_new_s = tl.maximum(m_s, here)
        rescale_s = tl.exp(m_s - m_new_s)
        b_u = b_s - m_new_s
        if TEACHER:
            b_t = load_logits(z_t_ptr, teacher, o_v, keep, False)
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
    tl.store(partial_ptr + M_S * split.stride_field, m_s)
    tl.store(partial_ptr + L_S * split.stride_field, tl.sum(b_l_s, 0))
    if TEACHER:
        tl.store(partial_ptr + M_T * split.stride_field, m_t)
        tl.store(partial_ptr + L_T * split.stride_field, tl.sum(b_l_t, 0))
        tl.store(partial_ptr + DIFFERENCE * split.stride_field, tl.sum(b_difference, 0))
    if CROSS:
        tl.store(partial_ptr + CROSS_S * split.stride_field, tl.sum(b_cross, 0))
    if STATISTICS:
        tl.store(partial_ptr + ENERGY_T * split.stride_field, tl.sum(b_energy, 0))
        tl.store(partial_ptr + TOP_S * split.stride_field, top_s.to(tl.float32))
        tl.store(partial_ptr + TOP_T * split.stride_field, top_t.to(tl.float32))


@triton.jit
def load_field(partial_ptr, field: tl.constexpr, split, o_p, otherwise: tl.constexpr):
    """Loads a partial sum of every part of one token."""
    return tl.load(partial_ptr + field * split.stride_field + o_p, mask=o_p < split.parts, other=otherwise)


@triton.jit
def combine_side(partial_ptr, split, o_p, M: tl.constexpr, L: tl.constexpr, LESS_ONE: tl.constexpr):
    """Combines one side's maxima and sums of exponentials, in float64.

    Returns the parts' maxima and their maximum, in float32; and the parts' sums, each part's maximum less the whole one, and the
    exponential of that.
    """
    b_m = load_field(partial_ptr, M, split, o_p, LOWEST)
    m = tl.max(b_m, 0)
    b_shift = b_m.to(tl.float64) - m.to(tl.float64)
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

    It also stores base and logarithm of the sum separately, and the difference of the two logarithms: the difference of two
    rounded log-sum-exps of 20 would be wrong by 2e-6.
    """
    i_token = tl.program_id(0).to(tl.int64)
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
    if form.MASKED:
        counts = tl.load(known.counted_ptr + i_token) != 0
    if counts:
        o_p = tl.arange(0, BLOCK_P)
        partial_ptr = split.partial_ptr + i_token * split.parts
        if form.STUDENT:
            b_m_s, m_s, b_l_s, b_shift_s, b_rescale_s = combine_side(partial_ptr, split, o_p, M_S, L_S, form.LESS_ONE)
            l_s = tl.sum(b_l_s * b_rescale_s, 0)
            base_s = m_s.to(tl.float64)
            log_sum_s = tl.log(l_s)
        else:
            base_s = tl.load(known.lse_s_ptr + i_token).to(tl.float64)
        if form.UNIFORM:
            log_sum_t = tl.log(zero + split.vocabulary)
        elif form.TEACHER:
            b_m_t, m_t, b_l_t, b_shift, b_rescale = combine_side(partial_ptr, split, o_p, M_T, L_T, form.LESS_ONE)
            b_l_t *= b_rescale
            l_t = tl.sum(b_l_t, 0)
            base_t = m_t.to(tl.float64)
            log_sum_t = tl.log(l_t)
            if form.STATISTICS:
                b_energy = load_field(partial_ptr, ENERGY_T, split, o_p, 0.0).to(tl.float64)
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
            b_cross = load_field(partial_ptr, CROSS_S, split, o_p, 0.0).to(tl.float64)
            offset = tl.sum(b_rescale_s * (b_cross + (b_shift_s - b_shift) * b_l_s), 0) / l_s - gap
            offset = tl.where(offset < 0.0, 0.0, offset)
            offset = tl.where(offset == float("inf"), float("nan"), offset)  # the gradient is undefined where KL is infinite
        if form.NLL:
            nll = lse_s
            if form.LABELS:
                label_z = tl.load(known.label_z_ptr + i_token).to(tl.float64)
                nll = tl.where(tl.load(known.labels_ptr + i_token) < 0, lse_s, lse_s - label_z)
    tl.store(out.lse_s_ptr + i_token, lse_s.to(out.lse_s_ptr.dtype.element_ty))
    tl.store(sums.base_s_ptr + i_token, base_s.to(tl.float32))
    tl.store(sums.log_sum_s_ptr + i_token, log_sum_s.to(tl.float32))
    if form.PAIR:
        tl.store(out.lse_t_ptr + i_token, lse_t.to(tl.float32))
        tl.store(sums.base_t_ptr + i_token, base_t.to(tl.float32))
        tl.store(sums.log_sum_t_ptr + i_token, log_sum_t.to(tl.float32))
        tl.store(sums.gap_ptr + i_token, gap.to(tl.float32))
    if form.CROSS:
        tl.store(sums.offset_ptr + i_token, offset.to(tl.float32))
    if form.NLL:
        tl.store(out.nll_ptr + i_token, nll.to(out.nll_ptr.dtype.element_ty))
    if form.STATISTICS:
        tl.store(out.entropy_ptr + i_token, entropy.to(tl.float32))
        tl.store(out.agreement_ptr + i_token, agreement.to(tl.float32))


@triton.jit
def loss_rows(
    student, teacher, counted_ptr, sums, weights,
    dz_ptr, stride_dz, columns,
    split,  # of [4, tokens, parts]: divergence, KL(s||m), skipped entries, sum of their squares
    form, HOLES: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Computes the divergence of one part of one token and d total / d product; zeros columns ``vocabulary`` to ``columns``."""
    i_token = tl.program_id(0).to(tl.int64)
    i_part = tl.program_id(1)
    z_s_ptr = student.z_ptr + i_token * student.stride
    z_t_ptr = teacher.z_ptr + i_token * teacher.stride
    dz_ptr += i_token * stride_dz
    partial_ptr = split.partial_ptr + i_token * split.parts + i_part
    start = i_part * split.part
    end = tl.minimum(start + split.part, split.vocabulary)
    counts = True
    if form.MASKED:
        counts = tl.load(counted_ptr + i_token) != 0

    b_value = tl.zeros([BLOCK_V], tl.float32)
    b_mixed = tl.zeros([BLOCK_V], tl.float32)
    b_squares = tl.zeros([BLOCK_V], tl.float32)
    skipped = tl.full([], 0.0, tl.float32)
    if counts:
        base_s = tl.load(sums.base_s_ptr + i_token)
        log_sum_s = tl.load(sums.log_sum_s_ptr + i_token)
        base_t = 0.0
        log_sum_t = 0.0
        gap = 0.0
        offset = 0.0
        factor = 0.0
        if form.TARGET != OWN:
            base_t = tl.load(sums.base_t_ptr + i_token)
            log_sum_t = tl.load(sums.log_sum_t_ptr + i_token)
            gap = tl.load(sums.gap_ptr + i_token)
            offset = tl.load(sums.offset_ptr + i_token)
            if form.GRADIENT:
                factor = tl.load(weights.factor_ptr + i_token)
        if form.NLL:
            own = tl.load(weights.own_ptr + i_token)
        if form.LABELS:
            label = tl.load(weights.labels_ptr + i_token)
            at_label = tl.load(weights.at_label_ptr + i_token)
        for first in range(start, end, BLOCK_V):
            o_v = first + tl.arange(0, BLOCK_V)
            keep = o_v < end
            b_s = load_logits(z_s_ptr, student, o_v, keep, HOLES)
            if form.TARGET == OWN or form.UNIFORM:
                b_t = b_s * 0.0
                b_t = tl.where(keep, 0.0, b_t)
            else:
                b_t = load_logits(z_t_ptr, teacher, o_v, keep, False)
            value, mixed, b_p, b_g = loss_and_slope(
                b_s, b_t, base_s, base_t, log_sum_s, log_sum_t, gap, offset, weights.beta_t, weights.beta_s, form.TARGET
            )
            if form.TARGET != OWN:
                b_value += tl.where(keep, value, 0.0)
                b_mixed += tl.where(keep, mixed, 0.0)
            if form.GRADIENT:
                b_test = b_p if form.TARGET == OWN else b_g
                b_out = b_g * factor
                loud = tl.max(tl.where(keep & ~(tl.abs(b_test) < weights.filter_below), 1, 0), 0)  # NaN counts as large
                if form.NLL:
                    b_own = own * b_p
                    if form.LABELS:
                        b_own = tl.where(o_v == label, at_label, b_own)
                        loud = tl.where((label >= first) & (label < first + BLOCK_V), 1, loud)
                    b_out += b_own
                if student.CAPPED:
                    b_tanh = b_s / student.outer
                    if HOLES:
                        b_tanh = tl.where(b_s == float("-inf"), 0.0, b_tanh)  # b_out is 0 there
                    b_out *= 1.0 - b_tanh * b_tanh
                if form.FILTER:
                    b_squares += tl.where(keep & (loud == 0), b_out * b_out, 0.0)
                    skipped += tl.where(loud == 0, tl.minimum(BLOCK_V, end - first).to(tl.float32), 0.0)
                    b_out = tl.where(loud == 0, 0.0, b_out)
                tl.store(dz_ptr + o_v, narrow(b_out, dz_ptr), mask=keep)
    elif form.GRADIENT:
        for first in range(start, end, BLOCK_V):
            o_v = first + tl.arange(0, BLOCK_V)
            tl.store(dz_ptr + o_v, tl.zeros([BLOCK_V], dz_ptr.dtype.element_ty), mask=o_v < end)
    if form.GRADIENT:  # noqa: SIM102
        if i_part == 0:
            for first in range(split.vocabulary, columns, BLOCK_V):
                o_v = first + tl.arange(0, BLOCK_V)
                tl.store(dz_ptr + o_v, tl.zeros([BLOCK_V], dz_ptr.dtype.element_ty), mask=o_v < columns)
    if form.TARGET != OWN:
        tl.store(partial_ptr, tl.sum(b_value, 0))
        tl.store(partial_ptr + split.stride_field, tl.sum(b_mixed, 0))
    if form.FILTER:
        tl.store(partial_ptr + 2 * split.stride_field, skipped)
        tl.store(partial_ptr + 3 * split.stride_field, tl.sum(b_squares, 0))


@triton.jit
def pick_rows(
    side, index_ptr, counted_ptr, out_ptr, vocabulary, known, MASKED: tl.constexpr,
    TAKE: tl.constexpr,  # replace the logits by -inf
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gathers shaped logits of one token at ``index[known]``; -inf for a negative index, NaN for one past the vocabulary."""
    i_token = tl.program_id(0).to(tl.int64)
    if MASKED:  # noqa: SIM102
        if tl.load(counted_ptr + i_token) == 0:
            return
    z_ptr = side.z_ptr + i_token * side.stride
    o_k = tl.arange(0, BLOCK_K)
    within = o_k < known
    b_at = tl.load(index_ptr + i_token * known + o_k, mask=within, other=-1)
    real = within & (b_at >= 0) & (b_at < vocabulary)
    b_raw = tl.load(z_ptr + b_at, mask=real, other=0.0).to(tl.float32)
    bias = 0.0
    if side.HAS_BIAS:
        bias = tl.load(side.bias_ptr + b_at, mask=real, other=0.0).to(tl.float32)
    b_z = shape_logits(b_raw, bias, side.inner, side.outer, side.HAS_BIAS, side.CAPPED)
    b_z = tl.where(b_at < 0, float("-inf"), tl.where(b_at >= vocabulary, float("nan"), b_z))
    tl.store(out_ptr + i_token * known + o_k, b_z, mask=within)
    if TAKE:
        tl.store(z_ptr + b_at, tl.full([BLOCK_K], float("-inf"), tl.float32), mask=real)


@triton.jit
def put_rows(
    dz_ptr, index_ptr, value_ptr, counted_ptr, vocabulary, known, stride_dz, MASKED: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Writes the gradients at a sparse teacher's entries into one token."""
    i_token = tl.program_id(0).to(tl.int64)
    if MASKED:  # noqa: SIM102
        if tl.load(counted_ptr + i_token) == 0:
            return
    o_k = tl.arange(0, BLOCK_K)
    b_at = tl.load(index_ptr + i_token * known + o_k, mask=o_k < known, other=-1)
    real = (b_at >= 0) & (b_at < vocabulary)
    b_value = tl.load(value_ptr + i_token * known + o_k, mask=real, other=0.0)
    tl.store(dz_ptr + i_token * stride_dz + b_at, narrow(b_value, dz_ptr), mask=real)
