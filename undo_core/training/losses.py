"""The token losses of the stages, from a model and a micro-batch; every one goes through the fused ops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from undo_core import ops
from undo_core.models import Head, head_of, hidden_states, hidden_states_at
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


def token_cross_entropy(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Cross-entropy of each next token, ``[batch, length - 1]`` float32, 0 where it is no label; the logits are made twice."""
    inputs, labels, mask = batch.shifted()
    head = head_of(model)
    return ops.linear_cross_entropy(
        hidden_states(model, *inputs), head.weight, labels.masked_fill(~mask, -100), reduction="none", **head.options()
    )


def uniform_kl(model: PreTrainedModel, batch: Batch, counted: int, vocab_size: int | None = None) -> torch.Tensor:
    """``KL(uniform || p)`` of the next token, summed over the batch's labels and divided by ``counted``; a scalar.

    With ``vocab_size``, rows of the head from there on are padding: the uniform law and ``p`` are over the tokens before them.
    """
    inputs, _, mask = batch.shifted()
    head = head_of(model)
    return ops.linear_uniform_kl(
        hidden_states(model, *inputs),
        head.weight,
        mask=mask,
        normalizer=float(max(counted, 1)),
        vocab_size=vocab_size,
        **head.options(),
    )


@dataclass(frozen=True)
class HiddenTargets:
    """What a teacher says about a batch, exactly: its final hidden states and its head.

    Attributes:
        hidden: ``[batch, length - 1, d]``; what the batch's mask leaves out may hold anything.
        head: of the teacher.
        lse: ``[batch, length - 1]`` float32 log-sum-exps of its logits, where known; they save a GPU work.
        inner: ``[batch, length - 1, d]`` each, its hidden states after each of the matched layers.
    """

    hidden: torch.Tensor
    head: Head
    lse: torch.Tensor | None = None
    inner: Sequence[torch.Tensor] = ()


@dataclass(frozen=True)
class TopTargets:
    """What a teacher says about a batch, in part: its most likely tokens.

    Attributes:
        indices: ``[batch, length - 1, k]`` integers, -1 where the batch's mask leaves a position out.
        logprobs: ``[batch, length - 1, k]`` float32, of the whole vocabulary, padding rows aside.
    """

    indices: torch.Tensor
    logprobs: torch.Tensor


@dataclass(frozen=True)
class Match:
    """Hidden states to be matched besides the logits.

    Attributes:
        weight: factor on the term.
        layers: after how many layers, as :func:`undo_core.models.hidden_states_at` has it.
    """

    weight: float
    layers: tuple[int, ...]


def distillation(
    student: PreTrainedModel,
    targets: HiddenTargets | TopTargets,
    batch: Batch,
    counted: int,
    match: Match | None = None,
    vocab_size: int | None = None,
) -> torch.Tensor:
    """Forward ``KL(teacher || student)`` at temperature 1, summed over the batch's labels and divided by ``counted``; a scalar.

    With ``vocab_size``, rows of either head from there on are padding: no probability and no gradient; the two heads may then differ in
    their number of rows.
    With ``match``, plus its weight times the mean over layers of :func:`relative_error`, summed and divided alike.
    """
    inputs, _, mask = batch.shifted()
    if match is None:
        return _divergence(hidden_states(student, *inputs), head_of(student), targets, mask, counted, vocab_size)
    hidden, inner = hidden_states_at(student, match.layers, *inputs)
    errors = [relative_error(*pair, mask, counted) for pair in zip(inner, targets.inner, strict=True)]
    value = _divergence(hidden, head_of(student), targets, mask, counted, vocab_size)
    return value + match.weight / len(errors) * sum(errors)


def relative_error(hidden: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, counted: int) -> torch.Tensor:
    """``|hidden - target|**2 / |target|**2`` of each token that ``mask`` counts, summed and divided by ``counted``; a scalar.

    Relative to the target's own length, since activations grow over layers and a few tokens' are a thousand times the others'; and
    token by token, so that micro-batches give the whole batch's gradient. Memory: both once more, in float32 at least.
    """
    wide = target.to(torch.promote_types(target.dtype, torch.float32))
    scale = wide.square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt().masked_fill(~mask.unsqueeze(-1), 0)
    return ops.rmu_loss(hidden * scale, wide * scale, mask=mask, normalize="masked") * (mask.sum() / max(counted, 1))


def _divergence(
    hidden: torch.Tensor,
    head: Head,
    targets: HiddenTargets | TopTargets,
    mask: torch.Tensor,
    counted: int,
    vocab_size: int | None,
) -> torch.Tensor:
    counts = {"mask": mask, "normalizer": float(max(counted, 1)), "vocab_size": vocab_size}
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
