"""The products of one [BLOCK_T, BLOCK_V] tile of logits, and the pieces that the code after them processes.

Indices past the last token or vocabulary entry are clamped by the caller. The inner loop then needs no mask.
"""

import triton
import triton.language as tl


@triton.jit
def operands(head, o_t, o_v, BLOCK_D: tl.constexpr):
    """Returns pointers to the first operands of a tile's product."""
    o_d = tl.arange(0, BLOCK_D)
    hidden_ptrs = head.hidden_ptr + o_t[:, None] * head.stride_hidden + o_d[None, :]
    return hidden_ptrs, head.weight_ptr + o_v[None, :] * head.stride_weight + o_d[:, None]


@triton.jit
def add_product(b_z, hidden_ptrs, weight_ptrs, head, first, PRECISION: tl.constexpr, BLOCK_D: tl.constexpr):
    """Adds the product over BLOCK_D of the width, from ``first`` on, to a tile."""
    if head.EVEN:
        b_h = tl.load(hidden_ptrs)
        b_w = tl.load(weight_ptrs)
    else:
        o_d = tl.arange(0, BLOCK_D)
        b_h = tl.load(hidden_ptrs, mask=o_d[None, :] < head.width - first, other=0.0)
        b_w = tl.load(weight_ptrs, mask=o_d[:, None] < head.width - first, other=0.0)
    if PRECISION == "interpreted":  # the interpreter would multiply the integer bits of bfloat16
        b_z = tl.dot(b_h.to(tl.float32), b_w.to(tl.float32), b_z, input_precision="ieee")
    else:
        b_z = tl.dot(b_h, b_w.to(b_h.dtype), b_z, input_precision=PRECISION)
    return b_z


@triton.jit
def project(head, o_t, o_v, PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):
    """Returns the products of one tile in float32, before bias, scale and softcap."""
    hidden_ptrs, weight_ptrs = operands(head, o_t, o_v, BLOCK_D)
    b_z = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    for first in range(0, head.width, BLOCK_D):
        b_z = add_product(b_z, hidden_ptrs, weight_ptrs, head, first, PRECISION, BLOCK_D)
        hidden_ptrs += BLOCK_D
        weight_ptrs += BLOCK_D
    return b_z


@triton.jit
def project_both(
    student, teacher, o_t, o_v,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Returns :func:`project` of both sides, TOGETHER from one loop."""
    if student.TOGETHER:
        hidden_s, weight_s = operands(student, o_t, o_v, BLOCK_D)
        hidden_t, weight_t = operands(teacher, o_t, o_v, BLOCK_D)
        b_s = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
        b_t = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
        for first in range(0, student.width, BLOCK_D):
            b_s = add_product(b_s, hidden_s, weight_s, student, first, PRECISION, BLOCK_D)
            b_t = add_product(b_t, hidden_t, weight_t, teacher, first, PRECISION, BLOCK_D)
            hidden_s += BLOCK_D
            hidden_t += BLOCK_D
            weight_s += BLOCK_D
            weight_t += BLOCK_D
    else:
        b_t = project(teacher, o_t, o_v, PRECISION, BLOCK_T, BLOCK_V, BLOCK_D)
        b_s = project(student, o_t, o_v, PRECISION, BLOCK_T, BLOCK_V, BLOCK_D)
    return b_s, b_t


@triton.jit
def half(b_z, right: tl.constexpr, BLOCK_T: tl.constexpr, WIDTH: tl.constexpr):
    left_half, right_half = tl.split(tl.permute(tl.reshape(b_z, (BLOCK_T, 2, WIDTH // 2)), (0, 2, 1)))
    out = right_half if right else left_half
    return out


@triton.jit
def piece(b_z, i: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, PIECES: tl.constexpr):
    """Returns the ``i``-th of PIECES groups of columns of a tile; it only selects registers.

    The code after the products processes one piece at a time, so that only one piece's temporaries occupy registers.
    """
    tl.static_assert(PIECES <= 8)
    out = b_z
    if PIECES >= 2:
        out = half(out, i >= PIECES // 2, BLOCK_T, BLOCK_V)
    if PIECES >= 4:
        out = half(out, i % (PIECES // 2) >= PIECES // 4, BLOCK_T, BLOCK_V // 2)
    if PIECES >= 8:
        out = half(out, i % (PIECES // 4) >= PIECES // 8, BLOCK_T, BLOCK_V // 4)
    return out
