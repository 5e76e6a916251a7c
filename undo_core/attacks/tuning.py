"""Trains a few vectors in a frozen model: the attacks that search an input or an activation rather than weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from undo_core.models import evaluating
from undo_core.training.batches import Batch
from undo_core.training.losses import cross_entropy


def tune(
    model: PreTrainedModel,
    vectors: torch.Tensor,
    batch_of: Callable[[int], Batch],
    *,
    steps: int,
    rate: float,
    project: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> None:
    """Minimises the cross-entropy of forget text over ``vectors`` in place, by Adam; the model's weights stay as they are.

    Args:
        model: a model in which ``vectors`` take part, by a hook.
        vectors: leaf tensor that requires a gradient.
        batch_of: function from the step to a batch.
        steps: number of steps.
        rate: constant learning rate.
        project: returns the nearest allowed vectors; applied after each step.

    Memory: the activations of a batch for a backward pass; no gradient of the weights.
    """
    optimizer, device = torch.optim.Adam([vectors], lr=rate), vectors.device
    required = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        with evaluating(model), torch.enable_grad():
            for step in range(steps):
                batch = batch_of(step).to(device)
                loss = cross_entropy(model, batch, batch.counted)
                (vectors.grad,) = torch.autograd.grad(loss, [vectors])
                optimizer.step()
                if project is not None:
                    with torch.no_grad():
                        vectors.copy_(project(vectors))
    finally:
        for parameter, before in zip(model.parameters(), required, strict=True):
            parameter.requires_grad_(before)
