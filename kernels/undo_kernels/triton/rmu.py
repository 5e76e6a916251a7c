"""RMU's activation loss on GPUs: ``sum_i factor_i mean_j (h_ij - c t_ij)**2`` and its gradient.

One program takes one token: it reads h (and t, where every token has its own) and writes the gradient, 4 bytes an element in 16
bits against one target, 6 against frozen activations; 3 FLOPs per element. The tokens' losses are summed by a second, tiny
reduction: no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from undo_kernels.library.backends import register
from undo_kernels.problem import gradient_dtype
from undo_kernels.record import Call, record, recording
from undo_kernels.triton.device import current

INTERPRETED = triton.knobs.runtime.interpret
BLOCK_D, WARPS = 1024, 4


@triton.jit
def rmu_rows(
    hidden_ptr, target_ptr, factor_ptr, gradient_ptr, partial_ptr,
    width, stride_hidden, stride_target,
    coefficient, even_factor,
    FACTOR: tl.constexpr,  # each token has a factor; tokens of factor 0 are not read
    OWN_TARGET: tl.constexpr,  # each token has its own target
    GRADIENT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Computes one token's loss and gradient."""
    i_token = tl.program_id(0).to(tl.int64)
    hidden_ptr += i_token * stride_hidden
    gradient_ptr += i_token * width
    if OWN_TARGET:
        target_ptr += i_token * stride_target
    factor = even_factor
    if FACTOR:
        factor = tl.load(factor_ptr + i_token)
    slope = 2.0 * factor / width
    b_squares = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, width, BLOCK_D):
        o_d = first + tl.arange(0, BLOCK_D)
        b_factor = tl.full([BLOCK_D], 0.0, tl.float32) + factor
        keep = (o_d < width) & (b_factor != 0.0)
        b_h = tl.load(hidden_ptr + o_d, mask=keep, other=0.0).to(tl.float32)
        b_t = tl.load(target_ptr + o_d, mask=keep, other=0.0).to(tl.float32)
        b_x = b_h - coefficient * b_t
        b_squares += b_x * b_x
        if GRADIENT:
            tl.store(gradient_ptr + o_d, (slope * b_x).to(gradient_ptr.dtype.element_ty), mask=o_d < width)
    tl.store(partial_ptr + i_token, factor * (tl.sum(b_squares, 0) / width))


@register("rmu_loss", "triton")
def rmu_loss(
    hidden: torch.Tensor, target: torch.Tensor, factor: torch.Tensor | None, coefficient: float, needs: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the loss, and its gradient if ``needs``; see ``undo_kernels.library.rmu``."""
    if hidden.device.type != "cuda" and not INTERPRETED:
        raise RuntimeError(f"backend: got triton for tensors on {hidden.device}, wanted a GPU or TRITON_INTERPRET=1")
    tokens, width = hidden.shape
    if recording():
        record(Call("rmu_loss", "triton", "one pass", "interpreted" if INTERPRETED else "", tokens, width, needs))
    with current(hidden.device):
        partial, gradient = launch(hidden, target, factor, coefficient, needs)
    return partial.sum(dtype=torch.float64).float(), gradient


def launch(
    hidden: torch.Tensor, target: torch.Tensor, factor: torch.Tensor | None, coefficient: float, needs: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launches the kernel; returns the tokens' losses and the gradient."""
    tokens, width = hidden.shape
    gradient = hidden.new_empty(hidden.shape if needs else 0, dtype=gradient_dtype(hidden.dtype))
    partial = hidden.new_empty(tokens, dtype=torch.float32)
    own = target.ndim == 2
    if tokens:
        rmu_rows[(tokens,)](
            hidden, target, partial if factor is None else factor.contiguous(), gradient, partial,
            width, hidden.stride(0), target.stride(0) if own else 0,
            coefficient, 1.0 / tokens,
            FACTOR=factor is not None, OWN_TARGET=own, GRADIENT=needs,
            BLOCK_D=min(BLOCK_D, triton.next_power_of_2(width)), num_warps=WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return partial, gradient
