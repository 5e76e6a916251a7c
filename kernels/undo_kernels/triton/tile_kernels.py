"""Matrix-tile kernels of the recompute plan: logits of a [BLOCK_T, BLOCK_V] tile live in registers and are never stored.

    stats_tiles  2 tokens V (d_s + d_t) FLOPs; writes a few floats per token and part of the vocabulary
    loss_tiles   the same FLOPs; writes the gradient if needed, 2 or 4 bytes per (token, vocabulary entry) pair

After the products stats_tiles takes 25 instructions a pair for both sides and 13 for one, loss_tiles 50, 6 of them special functions
each (sm_90, forward KL with a softcap, 16-bit inputs; float32 inputs: 171, 85, 126). Rejected on sm_90: 64 x 256 statistics tiles
(24 instructions; 189 and 102 barriers before a piece was a choice of registers), 64 x 128 with four warps (24 and 51, two programs a
multiprocessor, but half as many bytes again from the L2 cache), 128 x 256 (spills with labels and bias).

Where both sides have one width their products come from one loop on sm_90 (TOGETHER): their first operands arrive together, 2 to 3
instructions a pair and a barrier fewer. Else one runs after the other. Programs of the same vocabulary tile are neighbours in the
grid, so that a tile of the weight is read from memory once and then from the L2 cache.

Indices past the last token or vocabulary entry are clamped to it; the results are not stored. The inner loop then needs no mask.
"""

import triton
import triton.language as tl

from undo_kernels.triton.math import EXACT
from undo_kernels.triton.pair_math import (
    CROSS_S,
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
    loss_and_slope,
    narrow,
    natural,
    squash,
)  # fmt: skip
from undo_kernels.triton.tile_products import piece, project, project_both


@triton.jit
def squash_piece(b_z, head, o_v, last, FINE: tl.constexpr):
    """Returns products with their bias, and their ``q``."""
    if head.HAS_BIAS:
        b_z += tl.load(head.bias_ptr + o_v, mask=o_v < last, other=0.0).to(tl.float32)[None, :]
    return b_z, squash(b_z, head, FINE)


@triton.jit
def add_piece(l_rest, m, m_new, rescale, b_e):
    """Adds a piece to a sum of exponentials without its largest term, 1, beside which float32 would lose small ones."""
    b_at = b_e == 1.0
    small = tl.sum(tl.where(b_at, 0.0, b_e), 1)
    ones = tl.floor(tl.sum(b_e, 1) - small + 0.5)
    rises = m_new > m
    return tl.where(rises, rescale * (l_rest + 1.0), l_rest) + small + tl.where(rises, ones - 1.0, ones)


@triton.jit
def add_exact(b_z, head, m, l_rest, energy, top, first, end, STATISTICS: tl.constexpr, WIDTH: tl.constexpr):
    """Adds a piece to each token's maximum and sums; also returns its ``q``, logits, exponentials and the old sums' rescaling."""
    o_v = first + tl.arange(0, WIDTH)
    _, b_q = squash_piece(b_z, head, o_v, end, False)
    b_z = tl.where((o_v < end)[None, :], head.outer * b_q, float("-inf"))
    here = tl.max(b_z, 1)
    m_new = tl.maximum(m, here)
    rescale = tl.exp(m - m_new)
    b_low = b_z - m_new[:, None]
    b_e = tl.exp(b_low)
    if STATISTICS:
        at = tl.min(tl.where(b_z == here[:, None], o_v[None, :], 2147483647), 1)
        top = tl.where(here > m, at, top)
        # Logits are relative to the maximum, so when it rises by a shift, shift * sum is subtracted.
        energy = (energy - (l_rest + 1.0) * (m_new - m)) * rescale + tl.sum(b_e * cut(b_low), 1)
    return b_q, b_z, b_e, rescale, m_new, add_piece(l_rest, m, m_new, rescale, b_e), energy, top


@triton.jit
def add_fast(b_z, head, m, l, energy, top, first, end, STATISTICS: tl.constexpr, BLOCK_V: tl.constexpr):
    """Adds a tile to each token's maximum and sums; see ``pair_math.add_block``; returns the tile's ``q`` first."""
    o_v = first + tl.arange(0, BLOCK_V)
    _, b_q = squash_piece(b_z, head, o_v, end, False)
    b_e, rescale, m, l, energy, top = add_block(b_q, (o_v < end)[None, :], head, o_v[None, :], m, l, energy, top, STATISTICS)
    return b_q, b_e, rescale, m, l, energy, top


@triton.jit
def pick_piece(b_q, label, first, WIDTH: tl.constexpr):
    """Returns ``q`` of each token's label, 0 for a token whose label is elsewhere."""
    b_hit = (first + tl.arange(0, WIDTH))[None, :] == label[:, None]
    return tl.sum(tl.where(b_hit, b_q, 0.0), 1)


@triton.jit
def stats_tiles(
    student, teacher, split, labels_ptr, label_z_ptr, tokens,
    TEACHER: tl.constexpr, CROSS: tl.constexpr, STATISTICS: tl.constexpr, LABELS: tl.constexpr, SAME: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Computes maxima and sums of exponentials of BLOCK_T tokens over one part of the vocabulary.

    It omits the sum of the differences, which would need both products at once and so smaller tiles. For float32 inputs the sums
    leave out the largest term, 1: then their rounding error is 1e-7 of the other terms, like that of the products.
    """
    WIDTH: tl.constexpr = BLOCK_V // PIECES
    FAST: tl.constexpr = student.MATH != EXACT
    blocks = tl.cdiv(tokens, BLOCK_T)
    i_t = tl.program_id(0) % blocks
    i_part = tl.program_id(0) // blocks
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    keep_t = o_t < tokens
    o_t = tl.where(keep_t, o_t, tokens - 1).to(tl.int64)
    start = i_part * split.part
    end = tl.minimum(start + split.part, split.vocabulary)
    label = tl.full([BLOCK_T], -1, tl.int32)
    label_q = tl.zeros([BLOCK_T], tl.float32)
    if LABELS:
        label = tl.minimum(tl.load(labels_ptr + o_t), split.vocabulary).to(tl.int32)

    m_s = tl.full([BLOCK_T], 0.0, tl.float32) + (student.outer if student.BOUNDED else LOWEST)
    m_t = tl.full([BLOCK_T], 0.0, tl.float32) + (teacher.outer if teacher.BOUNDED else LOWEST)
    l_s = tl.full([BLOCK_T], 0.0 if FAST else -1.0, tl.float32)  # of an empty sum; minus 1
    l_t = tl.full([BLOCK_T], 0.0 if FAST else -1.0, tl.float32)
    cross = tl.zeros([BLOCK_T], tl.float32)
    energy = tl.zeros([BLOCK_T], tl.float32)
    top_s = tl.full([BLOCK_T], -1, tl.int32)
    top_t = tl.full([BLOCK_T], -1, tl.int32)
    for first in range(start, end, BLOCK_V):
        o_w = tl.minimum(first + tl.arange(0, BLOCK_V), split.vocabulary - 1).to(tl.int64)
        if TEACHER or CROSS:
            if student.TOGETHER:
                b_s, b_t = project_both(student, teacher, o_t, o_w, PRECISION, BLOCK_T, BLOCK_V, BLOCK_D)
            else:
                b_t = project(teacher, o_t, o_w, PRECISION, BLOCK_T, BLOCK_V, BLOCK_D)
            if FAST:
                b_t, _, _, m_t, l_t, energy, top_t = add_fast(
                    b_t, teacher, m_t, l_t, energy, top_t, first, end, STATISTICS, BLOCK_V
                )
            elif not CROSS:
                for i in tl.static_range(PIECES):
                    b_z = piece(b_t, i, BLOCK_T, BLOCK_V, PIECES)
                    _, _, _, _, m_t, l_t, energy, top_t = add_exact(
                        b_z, teacher, m_t, l_t, energy, top_t, first + i * WIDTH, end, STATISTICS, WIDTH
                    )
        if not student.TOGETHER:
            b_s = project(student, o_t, o_w, PRECISION, BLOCK_T, BLOCK_V, BLOCK_D)
        if FAST:
            b_s, b_e, rescale, m_s, l_s, _, top_s = add_fast(
                b_s, student, m_s, l_s, energy, top_s, first, end, STATISTICS, BLOCK_V
            )
            if LABELS:
                label_q += pick_piece(b_s, label, first, BLOCK_V)
            if CROSS:
                cross = cross * rescale + add_cross(b_e, b_s, b_t, student, teacher, SAME)
        else:
            for i in tl.static_range(PIECES):
                was_s = m_s
                was_t = m_t
                was_sum = l_s + 1.0
                b_z = piece(b_s, i, BLOCK_T, BLOCK_V, PIECES)
                b_q, b_z, b_e, rescale, m_s, l_s, _, top_s = add_exact(
                    b_z, student, m_s, l_s, energy, top_s, first + i * WIDTH, end, STATISTICS, WIDTH
                )
                if LABELS:
                    label_q += pick_piece(b_q, label, first + i * WIDTH, WIDTH)
                if CROSS:
                    _, b_y, _, _, m_t, l_t, energy, top_t = add_exact(
                        piece(b_t, i, BLOCK_T, BLOCK_V, PIECES), teacher, m_t, l_t, energy, top_t, first + i * WIDTH, end,
                        STATISTICS, WIDTH,
                    )  # fmt: skip
                    b_y = (b_z - m_s[:, None]) - (b_y - m_t[:, None])
                    shift = (was_s - m_s) - (was_t - m_t)
                    cross = rescale * (cross + shift * was_sum) + tl.sum(tl.where(b_e == 0.0, 0.0, b_e * b_y), 1)
    if LABELS:  # only the part that holds the label stores its logit
        within = (label >= start) & (label < end)
        tl.store(label_z_ptr + o_t, natural(label_q, student), mask=keep_t & within)
    if FAST:
        cross -= l_s * (m_s - m_t)
    partial_ptrs = split.partial_ptr + o_t * split.parts + i_part
    tl.store(partial_ptrs + M_S * split.stride_field, m_s, mask=keep_t)
    tl.store(partial_ptrs + L_S * split.stride_field, l_s, mask=keep_t)
    if TEACHER:
        tl.store(partial_ptrs + M_T * split.stride_field, m_t, mask=keep_t)
        tl.store(partial_ptrs + L_T * split.stride_field, l_t, mask=keep_t)
    if CROSS:
        tl.store(partial_ptrs + CROSS_S * split.stride_field, cross, mask=keep_t)
    if STATISTICS:
        tl.store(partial_ptrs + ENERGY_T * split.stride_field, energy, mask=keep_t)
        tl.store(partial_ptrs + TOP_S * split.stride_field, top_s.to(tl.float32), mask=keep_t)
        tl.store(partial_ptrs + TOP_T * split.stride_field, top_t.to(tl.float32), mask=keep_t)


@triton.jit
def loss_tiles(
    student, teacher, counted_ptr, sums, weights,
    # dz [tokens, last - begin]; partial [2, tiles, tokens] is added to: divergence, KL(s||m)
    dz_ptr, partial_ptr,
    tokens, begin, last, tiles, stride_dz,
    form, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Computes divergence and d total / d product of one tile of vocabulary entries ``begin`` to ``last``.

    Of jsd the launches for the gradient follow those that have computed the divergence, so they only compute the gradient.
    """
    MIXED: tl.constexpr = form.TARGET == JSD and not form.GRADIENT
    SUMS: tl.constexpr = MIXED or (form.TARGET != JSD and form.TARGET != OWN)
    FINE: tl.constexpr = form.UNIFORM or not (form.SAME or form.TARGET == OWN)  # the difference of small logits needs it
    WIDTH: tl.constexpr = BLOCK_V // PIECES
    # Sum over a token's entries last, if registers suffice.
    LATE: tl.constexpr = student.MATH != EXACT and form.TARGET != JSD and (student.CAPPED or not (form.MASKED or form.NLL))
    TWO: tl.constexpr = form.TARGET != OWN and not form.UNIFORM
    blocks = tl.cdiv(tokens, BLOCK_T)
    i_t = tl.program_id(0) % blocks
    i_v = tl.program_id(0) // blocks
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    keep_t = o_t < tokens
    o_t = tl.where(keep_t, o_t, tokens - 1).to(tl.int64)
    column = i_v * BLOCK_V  # of dz
    o_w = tl.minimum(begin + column + tl.arange(0, BLOCK_V), last - 1).to(tl.int64)

    if TWO:
        b_s, b_t = project_both(student, teacher, o_t, o_w, PRECISION, BLOCK_T, BLOCK_V, BLOCK_D)
    else:
        b_s = project(student, o_t, o_w, PRECISION, BLOCK_T, BLOCK_V, BLOCK_D)

    counts = keep_t
    if form.MASKED:
        counts = counts & (tl.load(counted_ptr + o_t) != 0)
    base_s = tl.load(sums.base_s_ptr + o_t)[:, None]
    log_sum_s = tl.load(sums.log_sum_s_ptr + o_t)[:, None]
    base_t = 0.0
    log_sum_t = 0.0
    gap = 0.0
    offset = 0.0
    if form.TARGET != OWN:
        base_t = tl.load(sums.base_t_ptr + o_t)[:, None]
        log_sum_t = tl.load(sums.log_sum_t_ptr + o_t)[:, None]
        gap = tl.load(sums.gap_ptr + o_t)[:, None]
        offset = tl.load(sums.offset_ptr + o_t)[:, None]
        if form.GRADIENT:
            factor = tl.load(weights.factor_ptr + o_t)[:, None]
    if form.NLL:
        own = tl.load(weights.own_ptr + o_t)[:, None]
    if form.LABELS:
        at_label = tl.load(weights.at_label_ptr + o_t)[:, None]
        label = (tl.minimum(tl.load(weights.labels_ptr + o_t), last) - begin - column).to(tl.int32)[:, None]

    total = tl.zeros([BLOCK_T], tl.float32)
    total_mixed = tl.zeros([BLOCK_T], tl.float32)
    b_total = tl.zeros([BLOCK_T, WIDTH], tl.float32)
    for i in tl.static_range(PIECES):
        o_p = i * WIDTH + tl.arange(0, WIDTH)
        o_v = begin + column + o_p
        within = (o_v < last)[None, :]
        b_z = piece(b_s, i, BLOCK_T, BLOCK_V, PIECES)
        b_z, b_q = squash_piece(b_z, student, o_v, last, FINE)
        b_y = b_z
        b_r = b_q
        if TWO:
            b_y, b_r = squash_piece(piece(b_t, i, BLOCK_T, BLOCK_V, PIECES), teacher, o_v, last, FINE)
        value, mixed, b_p, b_g = loss_and_slope(
            b_z, b_y, b_q, b_r, student, teacher, base_s, base_t, log_sum_s, log_sum_t, gap, offset,
            weights.beta_t, weights.beta_s, form,
        )  # fmt: skip
        if SUMS:
            if LATE:
                b_total += tl.where(within, value, 0.0)
            else:
                total += tl.sum(tl.where(within, value, 0.0), 1)
        if MIXED:
            total_mixed += tl.sum(tl.where(within, mixed, 0.0), 1)
        if form.GRADIENT:
            b_out = b_g
            if form.TARGET != OWN:
                b_out = b_g * factor
            if form.NLL:
                b_own = own * b_p
                if form.LABELS:
                    b_own = tl.where(o_p[None, :] == label, at_label, b_own)
                b_out += b_own
            if student.CAPPED:
                b_out *= 1.0 - b_q * b_q
            if form.MASKED:
                b_out = tl.where(counts[:, None], b_out, 0.0)
            dz_ptrs = dz_ptr + o_t[:, None] * stride_dz + (column + o_p)[None, :]
            tl.store(dz_ptrs, narrow(b_out, dz_ptr), mask=keep_t[:, None] & within)
    # Adds to the sums of earlier vocabulary blocks. Launches run one after another, so the order is fixed.
    partial_ptrs = partial_ptr + i_v.to(tl.int64) * tokens + o_t
    if SUMS:
        total = tl.where(counts, total + tl.sum(b_total, 1), 0.0)
        tl.store(partial_ptrs, tl.load(partial_ptrs, mask=keep_t, other=0.0) + total, mask=keep_t)
    if MIXED:
        total_mixed = tl.where(counts, total_mixed, 0.0)
        partial_ptrs += tiles * tokens
        tl.store(partial_ptrs, tl.load(partial_ptrs, mask=keep_t, other=0.0) + total_mixed, mask=keep_t)


@triton.jit
def pick_labels(head, labels_ptr, out_ptr, vocabulary, BLOCK_D: tl.constexpr):
    """Computes the logit of one token's label, for calls without a statistics pass; NaN for a label outside the vocabulary."""
    i_token = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + i_token)
    at = tl.minimum(tl.maximum(label, 0), vocabulary - 1)
    b_z = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, head.width, BLOCK_D):
        o_d = first + tl.arange(0, BLOCK_D)
        b_h = tl.load(head.hidden_ptr + i_token * head.stride_hidden + o_d, mask=o_d < head.width, other=0.0).to(tl.float32)
        b_z += b_h * tl.load(head.weight_ptr + at * head.stride_weight + o_d, mask=o_d < head.width, other=0.0).to(tl.float32)
    z = tl.sum(b_z, 0)
    if head.HAS_BIAS:
        z += tl.load(head.bias_ptr + at).to(tl.float32)
    z = natural(squash(z, head, True), head)
    tl.store(out_ptr + i_token, tl.where(label < vocabulary, z, float("nan")))
