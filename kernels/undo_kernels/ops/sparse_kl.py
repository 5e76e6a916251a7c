"""Forward KL against a teacher of which only ``k`` log-probabilities a token are known."""

from __future__ import annotations

from typing import Any, Literal

import torch

from undo_kernels.ops import arguments, checks
from undo_kernels.ops.dispatch import LossReduction, reduced_loss
from undo_kernels.projection import Projection


def linear_sparse_kl_div(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_indices: torch.Tensor,
    teacher_logprobs: torch.Tensor,
    *,
    tail: Literal["bucket", "renormalize"] = "bucket",
    mask: torch.Tensor | None = None,
    token_weight: torch.Tensor | None = None,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    bias: torch.Tensor | None = None,
    vocab_size: int | None = None,
    reduction: arguments.Reduction = "mean",
    normalizer: float | torch.Tensor | None = None,
    max_counted: int | None = None,
    plan: str = "auto",
    workspace_bytes: int | None = None,
    accumulate_into: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes forward KL against a teacher of which only ``k`` log-probabilities per token are known.

    ``tail="bucket"`` merges all other entries into one more outcome, whose probabilities are computed without cancellation.
    ``tail="renormalize"`` normalises both distributions over the known entries.

    Args:
        hidden: ``[..., d]``; gradient.
        weight: ``[V, d]``; gradient.
        teacher_indices: ``[..., k]`` integers. -1 is padding; an index that repeats at a token is an error.
        teacher_logprobs: ``[..., k]`` float, normalised over the whole vocabulary; no gradient. A token whose exponentials sum to more
            than 1 is refused, because it holds logits; on GPUs and in compiled graphs this is not checked.
        tail: bucket or renormalize.
        mask: this and all further arguments as in :func:`linear_cross_entropy`.
    """
    checks.head("", hidden, weight, bias)
    leading = hidden.shape[:-1]
    size = checks.vocabulary(vocab_size, weight.shape[0])
    projection = arguments.projection(hidden, weight, bias, scale, softcap, temperature, size, accumulate_into=accumulate_into)
    by = LossReduction.checked(leading, hidden.device, token_weight, reduction, normalizer, max_counted)
    memory = arguments.memory(plan, workspace_bytes)
    return _sparse(
        by, projection, teacher_indices, teacher_logprobs, tail, arguments.mask_of(mask, leading, hidden.device), memory
    )


def sparse_kl_div(
    student_logits: torch.Tensor,
    teacher_indices: torch.Tensor,
    teacher_logprobs: torch.Tensor,
    *,
    tail: Literal["bucket", "renormalize"] = "bucket",
    mask: torch.Tensor | None = None,
    token_weight: torch.Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    reduction: arguments.Reduction = "mean",
    normalizer: float | torch.Tensor | None = None,
    max_counted: int | None = None,
    plan: str = "auto",
    workspace_bytes: int | None = None,
) -> torch.Tensor:
    """Computes :func:`linear_sparse_kl_div` of student logits ``[..., V]`` that exist already."""
    checks.float_tensor("student_logits", student_logits, "[..., V]")
    leading = student_logits.shape[:-1]
    projection = arguments.given_logits(
        "temperature", student_logits, temperature, checks.vocabulary(vocab_size, student_logits.shape[-1])
    )
    by = LossReduction.checked(leading, student_logits.device, token_weight, reduction, normalizer, max_counted)
    counted = arguments.mask_of(mask, leading, student_logits.device)
    memory = arguments.memory(plan, workspace_bytes)
    return _sparse(by, projection, teacher_indices, teacher_logprobs, tail, counted, memory)


def _sparse(
    reduction: LossReduction,
    projection: Projection,
    indices: torch.Tensor,
    logprobs: torch.Tensor,
    tail: str,
    counted: torch.Tensor | None,
    memory: dict[str, Any],
) -> torch.Tensor:
    leading = reduction.leading
    checks.choice("tail", tail, ("bucket", "renormalize"))
    indices, logprobs = checks.replicated("teacher_indices", indices), checks.replicated("teacher_logprobs", logprobs)
    checks.sparse_teacher(indices, logprobs, leading, projection.entries, reduction.counting(counted), projection.hidden)
    tokens = leading.numel()
    indices = indices.reshape(tokens, indices.shape[-1]).long()
    logprobs = logprobs.detach().reshape(tokens, logprobs.shape[-1])
    return arguments.shaped(
        reduced_loss(projection, tail, reduction, counted=counted, indices=indices, logprobs=logprobs, **memory), reduction
    )
