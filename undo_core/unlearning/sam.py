"""SAM around a method: its gradient is taken where ``rho * g / |g|`` leads, ``g`` the gradient here, and applied here.

Foret et al., "Sharpness-Aware Minimization", 2021 (arXiv 2010.01412); against relearning, Fan et al., 2025 (arXiv 2502.05374).
Forget and retain gradients are both taken there, as in UNDO's code; Fan et al., as far as known, move the weights for the forget loss alone.
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

from undo_core.training.batches import Batch
from undo_core.training.loop import Loss
from undo_core.training.precision import rewound
from undo_core.unlearning.method import Costs, Method, Settings, register_robust


@dataclass(frozen=True)
class SAMConfig:
    """Settings of SAM alone.

    Attributes:
        rho: length of the step to where the gradient is taken, over all trained weights together; published for UNDO 0.01.
    """

    rho: float = 0.01

    def __post_init__(self) -> None:
        if not (math.isfinite(self.rho) and self.rho > 0):
            raise ValueError(f"rho: got {self.rho}, wanted a finite number > 0")


def _check(config: Settings) -> None:
    """A step in the backward pass has no whole gradient; an entry of ``rho * g / |g|`` is lost in 16 bits; the host has no weights to move."""
    train = config.train
    for name, value, wanted in (
        ("precision", train.precision, "float32"),
        ("step_in_backward", train.step_in_backward, False),
    ):
        if value != wanted:
            raise ValueError(f"robust: got sam with train.{name} {value}, wanted {wanted} with it")
    if train.optimizer == "adamw-offload":
        raise ValueError(
            "robust: got sam with train.optimizer adamw-offload, wanted another: it needs the gradients beside the weights"
        )


def _flops(costs: Costs, model: PreTrainedModel, config: Settings, length: int) -> Costs:
    """Everything twice."""
    return costs


@register_robust("sam", "SAM", settings=SAMConfig, flops=_flops, check=_check)
def sam(method: Method, model: PreTrainedModel, config: Settings) -> Method:
    """Memory: a second gradient of what is trained. The first one's storage keeps the weights while they are moved.

    Both gradients are of the whole batch, over all its micro-batches; the loss reported is the first one's.
    """

    def gradient(
        model: nn.Module, loss: Loss, batches: dict[str, Batch], counted: dict[str, int], micro_batch_size: int | None
    ) -> torch.Tensor:
        with rewound(next(model.parameters()).device):  # both passes draw the same dropout
            value = method.gradient(model, loss, batches, counted, micro_batch_size)
        with moved([p for p in model.parameters() if p.grad is not None], config.sam.rho):
            method.gradient(model, loss, batches, counted, micro_batch_size)
        return value

    return dataclasses.replace(method, gradient=gradient)


@contextlib.contextmanager
def moved(parameters: list[nn.Parameter], rho: float) -> Iterator[None]:
    """The parameters ``rho * g / |g|`` further inside the ``with`` block, without gradients; with their old bits afterwards."""
    with torch.no_grad():
        norms = torch._foreach_norm([p.grad for p in parameters], 2)
        scale = rho / torch.linalg.vector_norm(torch.stack(norms)).clamp_min(1e-12)
        for parameter in parameters:
            there = parameter + scale * parameter.grad
            parameter.grad.copy_(parameter)
            parameter.copy_(there)
    kept = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, old in zip(parameters, kept, strict=True):
                parameter.copy_(old)
