"""The token losses of the stages, from a model and a micro-batch; every one goes through the fused ops."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from undo_core import ops
from undo_core.models import Head, head_of, hidden_states
from undo_core.training.batches import Batch


def cross_entropy(model: PreTrainedModel, batch: Batch, counted: int) -> torch.Tensor:
    """Next-token cross-entropy, summed over the batch's labels and divided by ``counted``; a scalar."""
    inputs, labels, mask = batch.shifted()
    head = head_of(model)
    return ops.linear_cross_entropy(
        hidden_states(model, *inputs),
        head.weight,
        labels.masked_fill(~mask, -100),
        normalizer=float(max(counted, 1)),
        **head.options(),
    )


def uniform_kl(model: PreTrainedModel, batch: Batch, counted: int) -> torch.Tensor:
    """``KL(uniform || p)`` of the next token, summed over the batch's labels and divided by ``counted``; a scalar."""
    inputs, _, mask = batch.shifted()
    head = head_of(model)
    return ops.linear_uniform_kl(
        hidden_states(model, *inputs), head.weight, mask=mask, normalizer=float(max(counted, 1)), **head.options()
    )


@dataclass(frozen=True)
class HiddenTargets:
    """What a teacher says about a batch, exactly: its final hidden states and its head.

    Attributes:
        hidden: ``[batch, length - 1, d]``; what the batch's mask leaves out may hold anything.
        head: of the teacher.
        lse: ``[batch, length - 1]`` float32 log-sum-exps of its logits, where known; they save a GPU work.
    """

    hidden: torch.Tensor
    head: Head
    lse: torch.Tensor | None = None


@dataclass(frozen=True)
class TopTargets:
    """What a teacher says about a batch, in part: its most likely tokens.

    Attributes:
        indices: ``[batch, length - 1, k]`` integers, -1 where the batch's mask leaves a position out.
        logprobs: ``[batch, length - 1, k]`` float32, of the whole vocabulary.
    """

    indices: torch.Tensor
    logprobs: torch.Tensor


def distillation(student: PreTrainedModel, targets: HiddenTargets | TopTargets, batch: Batch, counted: int) -> torch.Tensor:
    """Forward ``KL(teacher || student)`` at temperature 1, summed over the batch's labels and divided by ``counted``; a scalar."""
    inputs, _, mask = batch.shifted()
    head = head_of(student)
    hidden = hidden_states(student, *inputs)
    counts = {"mask": mask, "normalizer": float(max(counted, 1))}
    if isinstance(targets, TopTargets):
        return ops.linear_sparse_kl_div(
            hidden, head.weight, targets.indices, targets.logprobs, tail="bucket", **counts, **head.options()
        )
    return ops.linear_kl_div(
        hidden,
        head.weight,
        targets.hidden,
        targets.head.weight.detach(),
        teacher_lse=targets.lse,
        **counts,
        **head.options("student_"),
        **targets.head.options("teacher_"),
    )
