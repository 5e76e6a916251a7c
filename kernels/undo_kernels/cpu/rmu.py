"""RMU's activation loss on CPUs: one pass of ``csrc/rmu_kernels.h`` in float32; the number of threads changes no sum."""

from __future__ import annotations

import torch

from undo_kernels.cpu.extension import Kind, kernels
from undo_kernels.cpu.instruction_set import vectors
from undo_kernels.library.backends import register
from undo_kernels.problem import gradient_dtype
from undo_kernels.record import Call, record, recording


@register("rmu_loss", "cpu")
def rmu_loss(
    hidden: torch.Tensor, target: torch.Tensor, factor: torch.Tensor | None, coefficient: float, needs: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the loss, and its gradient if ``needs``; see ``undo_kernels.library.rmu``."""
    tokens, width = hidden.shape
    form = vectors()
    if recording():
        record(Call("rmu_loss", "cpu", "one pass", form, tokens, width, needs))
    gradient = hidden.new_empty(hidden.shape if needs else 0, dtype=gradient_dtype(hidden.dtype))
    partial = torch.empty(tokens, dtype=torch.float64)
    factor = None if factor is None else factor.contiguous()
    loss = kernels.rmu_loss(
        form,
        tokens=tokens,
        width=width,
        hidden=hidden.data_ptr(),
        hidden_kind=_kind(hidden.dtype),
        stride_hidden=hidden.stride(0),
        target=target.data_ptr(),
        target_kind=_kind(target.dtype),
        stride_target=target.stride(0) if target.ndim == 2 else 0,
        coefficient=coefficient,
        factor=0 if factor is None else factor.data_ptr(),
        gradient=gradient.data_ptr() if needs else 0,
        partial=partial.data_ptr(),
    )
    return torch.tensor(loss, dtype=torch.float32), gradient


def _kind(dtype: torch.dtype) -> int:
    return Kind[str(dtype).removeprefix("torch.")]
