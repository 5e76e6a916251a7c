"""SAM, a wrapper: with ``g`` the gradient at the weights ``w``, apply to ``w`` the gradient at ``w + rho * g / |g|``.

Foret et al., "Sharpness-Aware Minimization", 2021 (arXiv 2010.01412); against relearning, Fan et al., 2025 (arXiv 2502.05374).
Both the forget and the retain gradient are taken at the moved weights, as in UNDO's code; Fan et al., as far as known, move the
weights only for the forget loss.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from undo_kernels.ops.checks import is_dtensor
from undo_kernels.ops.sharding import local_of

from undo_core.distributed.sharding import global_norm
from undo_core.training.batches import Batch
from undo_core.training.loop import Loss
from undo_core.training.precision import rewound
from undo_core.unlearning.method import Costs, Method, Settings, check_whole_gradient, register_robust


@dataclass(frozen=True)
class SAMConfig:
    """Settings of SAM alone.

    Attributes:
        rho: norm of the move, over all trained weights together; published for UNDO: 0.01.
    """

    rho: float = 0.01

    def __post_init__(self) -> None:
        if not (math.isfinite(self.rho) and self.rho > 0):
            raise ValueError(f"rho: got {self.rho}, wanted a finite number > 0")


def _flops(costs: Costs, model: PreTrainedModel, config: Settings, length: int) -> Costs:
    """Added FLOPs: everything is computed twice."""
    return costs


@register_robust("sam", "SAM", settings=SAMConfig, flops=_flops, check=check_whole_gradient)
def sam(method: Method, model: PreTrainedModel, config: Settings) -> Method:
    """Adds SAM to ``method``.

    Both gradients are of the whole batch, over all its micro-batches. The reported loss is the one at the weights before the
    move.

    Memory: a second gradient of the trained parameters. The first gradient's memory holds the old weights during the move.
    """

    def gradient(
        model: nn.Module, loss: Loss, batches: dict[str, Batch], counted: dict[str, int], micro_batch_size: int | None
    ) -> torch.Tensor:
        with rewound(next(model.parameters()).device):  # both passes must draw the same dropout
            value = method.gradient(model, loss, batches, counted, micro_batch_size)
        with moved([p for p in model.parameters() if p.grad is not None], config.sam.rho):
            method.gradient(model, loss, batches, counted, micro_batch_size)
        return value

    return dataclasses.replace(method, gradient=gradient)


@contextlib.contextmanager
def moved(parameters: list[nn.Parameter], rho: float) -> Iterator[None]:
    """Context with the parameters moved by ``rho * g / |g|`` and without gradients; restores their exact bits on exit."""
    with torch.no_grad():
        gradients = [parameter.grad for parameter in parameters]
        scale = rho / _norm(gradients).clamp_min(1e-12)
        for here, gradient in zip(map(local_of, parameters), map(local_of, gradients), strict=True):
            there = here + scale * gradient
            gradient.copy_(here)
            here.copy_(there)
    kept = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, old in zip(parameters, kept, strict=True):
                local_of(parameter).copy_(local_of(old))


def _norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    if any(map(is_dtensor, gradients)):
        return global_norm(gradients)
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2)))
