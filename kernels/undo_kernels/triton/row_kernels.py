"""Row kernels over stored logits: the chunk plan's float32 products, or logits given by the caller.

One program processes one part of the logits of one token; parts are combined in a fixed order. Cost of each (token, vocabulary
entry) pair::

    stats_rows   reads 8 bytes (4 without a teacher), 25 instructions, 6 of them special functions (float32 inputs: 116)
    loss_rows    reads 8 bytes, writes the gradient (2 or 4), 46 instructions, 6 special (float32 inputs: 120)

on sm_90, forward KL with a softcap; jsd takes 75 for the divergence and then 60 for the gradient. With 16-bit inputs both wait for memory, not for instructions.
Rejected: a maximum over the whole block in each iteration (2 shuffles a pair and 4 barriers; now one for each four logits).

Nest an ``if`` on a tensor inside the ``if`` on a constexpr: with ``and``, Triton evaluates both operands.

The gradient may overwrite logits of the same dtype, because each element is read and written by a single program.
"""

import triton
import triton.language as tl

from undo_kernels.triton.math import EXACT, exp2, expm1
from undo_kernels.triton.pair_math import (
    CROSS_S,
    DIFFERENCE,
    ENERGY_T,
    JSD,
    L_S,
    L_T,
    LOWEST,
    M_S,
    M_T,
    OWN,
    TOP_S,
    TOP_T,
    add_block,
    add_cross,
    cut,
    log_difference,
    loss_and_slope,
    narrow,
    natural,
    rescale_difference,
    squash,
)  # fmt: skip


@triton.jit
def load_squashed(z_ptr, side, o_v, keep, HOLES: tl.constexpr, FINE: tl.constexpr):
    """Loads a block of one token's logits.

    Returns them with their bias, their ``q``, and which of them are there: with HOLES, none that was removed.
    """
    raw = tl.load(z_ptr + o_v, mask=keep, other=0.0).to(tl.float32)
    if HOLES:
        keep = keep & (raw != float("-inf"))
    if side.HAS_BIAS:
        raw += tl.load(side.bias_ptr + o_v, mask=keep, other=0.0).to(tl.float32)
    return raw, squash(raw, side, FINE), keep


@triton.jit
def exact_stats(
    z_s_ptr, z_t_ptr, student, teacher, start, end, end_t,
    TEACHER: tl.constexpr, CROSS: tl.constexpr, STATISTICS: tl.constexpr, HOLES: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Maxima and sums of one part of one token; with a teacher, also the sum of the differences of their exponentials.

    The latter gives the difference of two nearly equal log-sum-exps; subtracting two float32 sums is only accurate to 1e-7.
    """
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
        _, b_q, b_here = load_squashed(z_s_ptr, student, o_v, keep, HOLES, False)
        b_s = tl.where(b_here, student.outer * b_q, float("-inf"))
        here = tl.max(b_s, 0)
        if STATISTICS:
            top_s = tl.where(here > m_s, tl.min(tl.where(b_s == here, o_v, 2147483647), 0), top_s)
        m_new_s = tl.maximum(m_s, here)
        rescale_s = tl.exp(m_s - m_new_s)
        b_u = b_s - m_new_s
        if TEACHER:
            _, b_q, _ = load_squashed(z_t_ptr, teacher, o_v, o_v < end_t, False, False)
            b_t = tl.where(keep, teacher.outer * b_q, float("-inf"))
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
            b_e, b_w, _ = expm1(-tl.abs(b_y), EXACT)
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
    return (
        m_s, tl.sum(b_l_s, 0), m_t, tl.sum(b_l_t, 0), tl.sum(b_cross, 0), tl.sum(b_energy, 0), top_s, top_t, tl.sum(b_difference, 0)
    )  # fmt: skip


@triton.jit
def fast_stats(
    z_s_ptr, z_t_ptr, student, teacher, start, end, end_t,
    TEACHER: tl.constexpr, CROSS: tl.constexpr, STATISTICS: tl.constexpr, SAME: tl.constexpr, HOLES: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Maxima and sums of one part of one token: each lane of four neighbouring logits has its own until the end."""
    LANES: tl.constexpr = BLOCK_V // 4
    m_s = tl.full([LANES], 0.0, tl.float32) + (student.outer if student.BOUNDED else LOWEST)
    m_t = tl.full([LANES], 0.0, tl.float32) + (teacher.outer if teacher.BOUNDED else LOWEST)
    l_s = tl.zeros([LANES], tl.float32)
    l_t = tl.zeros([LANES], tl.float32)
    cross = tl.zeros([LANES], tl.float32)
    energy = tl.zeros([LANES], tl.float32)
    top_s = tl.full([LANES], -1, tl.int32)
    top_t = tl.full([LANES], -1, tl.int32)
    for first in range(start, end, BLOCK_V):
        o_v = first + tl.arange(0, BLOCK_V)
        keep = o_v < end
        _, b_s, b_here = load_squashed(z_s_ptr, student, o_v, keep, HOLES, False)
        b_s, b_here, o_l = tl.reshape(b_s, [LANES, 4]), tl.reshape(b_here, [LANES, 4]), tl.reshape(o_v, [LANES, 4])
        b_e, rescale, m_s, l_s, _, top_s = add_block(b_s, b_here, student, o_l, m_s, l_s, energy, top_s, STATISTICS)
        if TEACHER:
            _, b_t, _ = load_squashed(z_t_ptr, teacher, o_v, o_v < end_t, False, False)
            b_t = tl.reshape(b_t, [LANES, 4])
            _, _, m_t, l_t, energy, top_t = add_block(
                b_t, tl.reshape(keep, [LANES, 4]), teacher, o_l, m_t, l_t, energy, top_t, STATISTICS
            )
            if CROSS:
                cross = cross * rescale + add_cross(b_e, b_s, b_t, student, teacher, SAME)
    m_all = tl.max(m_s, 0)
    rescale_s = exp2(m_s - m_all, student.MATH)
    l_all = tl.sum(l_s * rescale_s, 0)
    m_all_t = tl.max(m_t, 0)
    shift = m_t - m_all_t
    rescale_t = exp2(shift, teacher.MATH)
    cross = tl.sum(cross * rescale_s, 0) - l_all * (m_all - m_all_t)
    if STATISTICS:
        energy = tl.sum((energy + l_t * shift) * rescale_t, 0)
        top_s = tl.min(tl.where(m_s == m_all, top_s, 2147483647), 0)
        top_t = tl.min(tl.where(m_t == m_all_t, top_t, 2147483647), 0)
    return m_all, l_all, m_all_t, tl.sum(l_t * rescale_t, 0), cross, energy, top_s, top_t, 0.0


@triton.jit
def stats_rows(
    student, teacher, split, counted_ptr,
    TEACHER: tl.constexpr, CROSS: tl.constexpr, STATISTICS: tl.constexpr, MASKED: tl.constexpr,  # see StatsForm
    SAME: tl.constexpr, HOLES: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Computes maximum and sum of exponentials of one part of one token, and what the flags ask for."""
    i_token = tl.program_id(0).to(tl.int64)
    i_part = tl.program_id(1)
    start = i_part * split.part
    end = tl.minimum(start + split.part, split.vocabulary)
    end_t = end  # of the teacher's logits that are read; others are 0
    if MASKED:
        counted = tl.load(counted_ptr + i_token)
        if counted == 0:
            return
        end_t = tl.where(counted == 1, end, start)
    z_s_ptr = student.z_ptr + i_token * student.stride
    z_t_ptr = teacher.z_ptr + i_token * teacher.stride
    partial_ptr = split.partial_ptr + i_token * split.parts + i_part

    if student.MATH == EXACT:
        m_s, l_s, m_t, l_t, cross, energy, top_s, top_t, difference = exact_stats(
            z_s_ptr, z_t_ptr, student, teacher, start, end, end_t, TEACHER, CROSS, STATISTICS, HOLES, BLOCK_V
        )
    else:
        m_s, l_s, m_t, l_t, cross, energy, top_s, top_t, difference = fast_stats(
            z_s_ptr, z_t_ptr, student, teacher, start, end, end_t, TEACHER, CROSS, STATISTICS, SAME, HOLES, BLOCK_V
        )
    tl.store(partial_ptr + M_S * split.stride_field, m_s)
    tl.store(partial_ptr + L_S * split.stride_field, l_s)
    if TEACHER:
        tl.store(partial_ptr + M_T * split.stride_field, m_t)
        tl.store(partial_ptr + L_T * split.stride_field, l_t)
        tl.store(partial_ptr + DIFFERENCE * split.stride_field, difference)
    if CROSS:
        tl.store(partial_ptr + CROSS_S * split.stride_field, cross)
    if STATISTICS:
        tl.store(partial_ptr + ENERGY_T * split.stride_field, energy)
        tl.store(partial_ptr + TOP_S * split.stride_field, top_s.to(tl.float32))
        tl.store(partial_ptr + TOP_T * split.stride_field, top_t.to(tl.float32))


@triton.jit
def loss_rows(
    student, teacher, counted_ptr, sums, weights,
    dz_ptr, stride_dz, columns,
    split,  # of [2, tokens, parts]: divergence, KL(s||m)
    form, HOLES: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Computes the divergence of one part of one token and d total / d product; zeros columns ``vocabulary`` to ``columns``.

    Of jsd the launch for the gradient follows one that has computed the divergence, so it only computes the gradient.
    """
    MIXED: tl.constexpr = form.TARGET == JSD and not form.GRADIENT
    SUMS: tl.constexpr = MIXED or (form.TARGET != JSD and form.TARGET != OWN)
    FINE: tl.constexpr = form.UNIFORM or not (form.SAME or form.TARGET == OWN)  # the difference of small logits needs it
    i_token = tl.program_id(0).to(tl.int64)
    i_part = tl.program_id(1)
    z_s_ptr = student.z_ptr + i_token * student.stride
    z_t_ptr = teacher.z_ptr + i_token * teacher.stride
    dz_ptr += i_token * stride_dz
    partial_ptr = split.partial_ptr + i_token * split.parts + i_part
    start = i_part * split.part
    end = tl.minimum(start + split.part, split.vocabulary)
    end_t = end  # of the teacher's logits that are read; others are 0
    counts = True
    if form.MASKED:
        counted = tl.load(counted_ptr + i_token)
        counts = counted != 0
        end_t = tl.where(counted == 1, end, start)

    b_value = tl.zeros([BLOCK_V], tl.float32)
    b_mixed = tl.zeros([BLOCK_V], tl.float32)
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
            b_z, b_s, b_here = load_squashed(z_s_ptr, student, o_v, keep, HOLES, FINE)
            b_y = b_z
            b_t = b_s
            if form.TARGET != OWN:  # noqa: SIM102
                if not form.UNIFORM:
                    b_y, b_t, _ = load_squashed(z_t_ptr, teacher, o_v, o_v < end_t, False, FINE)
            value, mixed, b_p, b_g = loss_and_slope(
                b_z, b_y, b_s, b_t, student, teacher, base_s, base_t, log_sum_s, log_sum_t, gap, offset,
                weights.beta_t, weights.beta_s, form,
            )  # fmt: skip
            if HOLES:
                b_p = tl.where(b_here, b_p, 0.0)
            if SUMS:
                b_value += tl.where(keep, value, 0.0)
            if MIXED:
                b_mixed += tl.where(keep, mixed, 0.0)
            if form.GRADIENT:
                b_out = b_g * factor
                if form.NLL:
                    b_own = own * b_p
                    if form.LABELS:
                        b_own = tl.where(o_v == label, at_label, b_own)
                    b_out += b_own
                if student.CAPPED:
                    b_out *= 1.0 - b_s * b_s
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
    if SUMS:
        tl.store(partial_ptr, tl.sum(b_value, 0))
    if MIXED:
        tl.store(partial_ptr + split.stride_field, tl.sum(b_mixed, 0))


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
    if side.HAS_BIAS:
        b_raw += tl.load(side.bias_ptr + b_at, mask=real, other=0.0).to(tl.float32)
    b_z = natural(squash(b_raw, side, True), side)
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
