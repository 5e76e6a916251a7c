"""The token losses of the stages, from a model and a micro-batch; every one goes through the fused ops."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from undo_core import ops
from undo_core.models import head_of, hidden_states
from undo_core.training.batches import Batch


def cross_entropy(model: PreTrainedModel, batch: Batch, counted: int) -> torch.Tensor:
    """Next-token cross-entropy, summed over the batch's labels and divided by ``counted``; a scalar."""
    inputs, attention, labels, mask = batch.shifted()
    head = head_of(model)
    return ops.linear_cross_entropy(
        hidden_states(model, inputs, attention),
        head.weight,
        labels.masked_fill(~mask, -100),
        normalizer=float(max(counted, 1)),
        **head.options(),
    )


def uniform_kl(model: PreTrainedModel, batch: Batch, counted: int) -> torch.Tensor:
    """``KL(uniform || p)`` of the next token, summed over the batch's labels and divided by ``counted``; a scalar."""
    inputs, attention, _, mask = batch.shifted()
    head = head_of(model)
    return ops.linear_uniform_kl(
        hidden_states(model, inputs, attention), head.weight, mask=mask, normalizer=float(max(counted, 1)), **head.options()
    )


def distillation(student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch, counted: int) -> torch.Tensor:
    """Forward ``KL(teacher || student)`` at temperature 1, summed over the batch's labels and divided by ``counted``; a scalar."""
    inputs, attention, _, mask = batch.shifted()
    student_head, teacher_head = head_of(student), head_of(teacher)
    with torch.no_grad():
        teacher_hidden = hidden_states(teacher, inputs, attention)
    return ops.linear_kl_div(
        hidden_states(student, inputs, attention),
        student_head.weight,
        teacher_hidden,
        teacher_head.weight.detach(),
        mask=mask,
        normalizer=float(max(counted, 1)),
        **student_head.options("student_"),
        **teacher_head.options("teacher_"),
    )
