"""RMU's activation loss as a ``torch.library`` op, whose forward computes the gradient and whose backward scales it in place.

``undo::rmu_loss(hidden [tokens, d], target [d] or [tokens, d], factor [tokens] float32 or None, coefficient, needs, backend)``
returns ``sum_i factor_i mean_j (hidden_ij - coefficient target_ij)**2`` and its gradient, which is empty unless needed. A
factor of None means 1 / tokens for each. Tokens of factor 0 are not read. The last dimension is contiguous; float32, bfloat16
and float16.
"""

from __future__ import annotations

from typing import Any

import torch

from undo_kernels.library.backends import implementation_on
from undo_kernels.library.scale import refuse_double_backward, scaled
from undo_kernels.problem import gradient_dtype

torch.library.define(
    "undo::rmu_loss",
    "(Tensor hidden, Tensor target, Tensor? factor, float coefficient, bool needs, str backend) -> (Tensor, Tensor)",
)


@torch.library.impl("undo::rmu_loss", ("cpu", "cuda"))
def _run(
    hidden: torch.Tensor, target: torch.Tensor, factor: torch.Tensor | None, coefficient: float, needs: bool, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return implementation_on("rmu_loss", backend)(hidden, target, factor, coefficient, needs)


@torch.library.register_fake("undo::rmu_loss")
def _shapes(hidden: torch.Tensor, target: Any, factor: Any, coefficient: float, needs: bool, backend: str) -> Any:
    loss = hidden.new_empty((), dtype=torch.float32)
    return loss, hidden.new_empty(hidden.shape if needs else 0, dtype=gradient_dtype(hidden.dtype))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])
    ctx.dtype, ctx.needs = inputs[0].dtype, inputs[4]


def _backward(ctx: Any, grad_loss: torch.Tensor | None, _: Any) -> tuple[Any, ...]:
    refuse_double_backward("rmu_loss")
    wanted = ctx.needs and grad_loss is not None
    return scaled(ctx.saved_tensors[0], grad_loss, ctx.dtype) if wanted else None, None, None, None, None, None


torch.library.register_autograd("undo::rmu_loss", _backward, setup_context=_save)
