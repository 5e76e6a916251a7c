"""ILU, a wrapper: scaling all trained weights by one factor shall not change the loss of fine-tuning, to first order.

``method's loss + weight * (d/ds CE(s * theta)(retain text) at s = 1)**2``; Wang et al., "Invariance Makes LLM Unlearning Resilient Even
to Unanticipated Downstream Fine-Tuning", 2025 (arXiv 2506.01339): the penalty of invariant risk minimisation, ``(theta . grad CE)**2``,
over text to which the model may be fine-tuned. Details, and differences from the published method:

- The fused loss has no second derivative. Here the penalty is the square of the central difference quotient
  ``D = (CE((1 + h) theta) - CE((1 - h) theta)) / 2h``, and its gradient ``2 D ((1 + h) g+ - (1 - h) g-) / 2h``, with the gradients ``g+``
  and ``g-`` at the scaled weights, is exact. ``D`` differs from the derivative by ``O(h**2)``.
- The text is the retain text. Published: a set of its own, unrelated to the forget text; several sets were not better than one.
- Only trained weights are scaled. Of a model with adapters these are the adapters.
- The published weight could not be verified; summaries of the paper name 0.05 as weak and more than 0.1 as harmful.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from undo_kernels.ops.sharding import local_of

from undo_core import distributed
from undo_core.distributed.parts import once
from undo_core.models import forward_flops
from undo_core.training.batches import Batch
from undo_core.training.loop import Loss, accumulate
from undo_core.training.losses import cross_entropy
from undo_core.training.precision import rewound
from undo_core.unlearning.method import Costs, Method, Settings, check_whole_gradient, register_robust


@dataclass(frozen=True)
class ILUConfig:
    """Settings of ILU alone.

    Attributes:
        weight: factor on the penalty.
        step: relative change of the weights in the difference quotient, ``h``. Smaller ones are nearer to the derivative, and rounding
            errors grow as ``1 / h``.
    """

    weight: float = 0.1
    step: float = 0.01

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"weight: got {self.weight}, wanted a finite number > 0")
        if not 1e-4 <= self.step <= 0.5:
            raise ValueError(f"step: got {self.step}, wanted a number from 1e-4 to 0.5")


def _check(config: Settings) -> None:
    if not config.retain_weight:
        raise ValueError(
            "robust: got ilu with retain_weight 0, wanted a retain_weight > 0 with it: its penalty reads the retain text"
        )
    check_whole_gradient(config)


def _flops(costs: Costs, model: PreTrainedModel, config: Settings, length: int) -> Costs:
    """Added FLOPs: two forward and backward passes of the retain text."""
    return {"forget": 0.0, "retain": 6 * forward_flops(model, length)}


@register_robust("ilu", "ILU", settings=ILUConfig, flops=_flops, check=_check)
def ilu(method: Method, model: PreTrainedModel, config: Settings) -> Method:
    """Adds ILU to ``method``.

    Memory: a second gradient and a copy of the trained parameters.
    """
    weight, h = config.ilu.weight, config.ilu.step

    def gradient(
        model: nn.Module, loss: Loss, batches: dict[str, Batch], counted: dict[str, int], micro_batch_size: int | None
    ) -> torch.Tensor:
        value = method.gradient(model, loss, batches, counted, micro_batch_size)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        others = [parameter.grad for parameter in trained]
        here = [local_of(parameter).detach().clone() for parameter in trained]
        for parameter in trained:
            parameter.grad = None
        text, ends = {"retain": batches["retain"]}, []
        try:
            for factor, restart in ((1 + h, True), (1 - h, False)):
                with torch.no_grad():
                    for parameter, old in zip(map(local_of, trained), here, strict=True):
                        torch.mul(old, factor, out=parameter)
                    for ready in _gradients(trained):  # of the larger weights, to be subtracted
                        ready.mul_(-(1 + h) / (1 - h))
                with rewound(trained[0].device) if restart else contextlib.nullcontext():  # both draw the same dropout
                    ends.append(accumulate(model, _fine_tuning, text, counted, micro_batch_size))
        finally:
            with torch.no_grad():
                for parameter, old in zip(map(local_of, trained), here, strict=True):
                    parameter.copy_(old)
        quotient = distributed.total(ends[0] - ends[1]) / (2 * h)
        with torch.no_grad():
            for ready in _gradients(trained):
                ready.mul_(-2 * weight * quotient * (1 - h) / (2 * h))
            for parameter, other in zip(trained, others, strict=True):
                if other is not None:
                    parameter.grad = other if parameter.grad is None else parameter.grad.add_(other)
        return value + once(weight * quotient.square())

    return dataclasses.replace(method, gradient=gradient)


def _fine_tuning(model: PreTrainedModel, batches: dict[str, Batch], counted: dict[str, int]) -> torch.Tensor:
    return cross_entropy(model, batches["retain"], counted["retain"])


def _gradients(parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    return [local_of(parameter.grad) for parameter in parameters if parameter.grad is not None]
