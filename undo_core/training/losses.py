"""Token losses of the stages, computed from a model and a micro-batch with the fused ops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from undo_core import ops
from undo_core.distributed import head_ops
from undo_core.models import Head, head_of, hidden_states, hidden_states_at
from undo_core.training.batches import Batch


def cross_entropy(model: PreTrainedModel, batch: Batch, counted: int) -> torch.Tensor:
    """Next-token cross-entropy, summed over the batch's labels and divided by ``counted``; a scalar."""
    inputs, labels, mask = batch.shifted()
    return head_ops.linear_cross_entropy(
        hidden_states(model, *inputs), head_of(model), labels.masked_fill(~mask, -100), normalizer=float(max(counted, 1))
    )


def token_cross_entropy(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Cross-entropy of each next token, ``[batch, length - 1]`` float32, 0 without a label; computes the logits twice."""
    inputs, labels, mask = batch.shifted()
    return head_ops.linear_cross_entropy(
        hidden_states(model, *inputs), head_of(model), labels.masked_fill(~mask, -100), reduction="none"
    )


def uniform_kl(model: PreTrainedModel, batch: Batch, counted: int, vocab_size: int | None = None) -> torch.Tensor:
    """``KL(uniform || p)`` of the next token, summed over the batch's labels and divided by ``counted``; a scalar.

    With ``vocab_size``, the vocabulary entries of the head from that index on are padding: ``uniform`` and ``p`` are
    distributions over the entries before.
    """
    inputs, _, mask = batch.shifted()
    return head_ops.linear_uniform_kl(
        hidden_states(model, *inputs),
        head_of(model),
        mask=mask,
        normalizer=float(max(counted, 1)),
        vocab_size=vocab_size,
    )


@dataclass(frozen=True)
class HiddenTargets:
    """Exact targets of a teacher for a batch: its final hidden states and its head.

    Attributes:
        hidden: ``[batch, length - 1, d]``; positions outside the batch's mask are ignored.
        head: the teacher's head.
        lse: ``[batch, length - 1]`` float32 log-sum-exps of the teacher's logits, or None; with them a GPU need not compute
            them again.
        inner: the teacher's hidden states after each matched layer, each ``[batch, length - 1, d]``.
    """

    hidden: torch.Tensor
    head: Head
    lse: torch.Tensor | None = None
    inner: Sequence[torch.Tensor] = ()


@dataclass(frozen=True)
class TopTargets:
    """Approximate targets of a teacher for a batch: its most likely tokens.

    Attributes:
        indices: ``[batch, length - 1, k]`` integer token ids, -1 at positions outside the batch's mask.
        logprobs: ``[batch, length - 1, k]`` float32 log-probabilities, normalised over the whole vocabulary without padding
            rows.
    """

    indices: torch.Tensor
    logprobs: torch.Tensor


@dataclass(frozen=True)
class Match:
    """Hidden states that the student matches in addition to the logits.

    Attributes:
        weight: factor on the term.
        layers: the matched hidden states, each given as a number of layers as in :func:`undo_core.models.hidden_states_at`.
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
    divergence: str = "forward",
) -> torch.Tensor:
    """``KL(teacher || student)`` at temperature 1, or another ``divergence`` of exact targets, summed over the batch's labels and divided by ``counted``; a scalar.

    With ``vocab_size``, the vocabulary entries of both heads from that index on are padding, without probability or gradient;
    the two heads may then differ in their number of entries. With ``match``, its weight times the mean of
    :func:`relative_error` over the layers is added.
    """
    inputs, _, mask = batch.shifted()
    if match is None:
        return _divergence(hidden_states(student, *inputs), head_of(student), targets, mask, counted, vocab_size, divergence)
    hidden, inner = hidden_states_at(student, match.layers, *inputs)
    errors = [relative_error(*pair, mask, counted) for pair in zip(inner, targets.inner, strict=True)]
    value = _divergence(hidden, head_of(student), targets, mask, counted, vocab_size, divergence)
    return value + match.weight / len(errors) * sum(errors)


def relative_error(hidden: torch.Tensor, target: torch.Tensor, mask: torch.Tensor, counted: int) -> torch.Tensor:
    """``|hidden - target|**2 / |target|**2``, summed over the tokens in ``mask`` and divided by ``counted``; a scalar.

    The error is relative to the target's norm because activations grow over the layers, and those of a few tokens are a
    thousand times larger than the others. It is normalised per token, so that the gradients of micro-batches add up to that of
    the whole batch. Memory: a copy of both tensors, in float32 or wider.
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
    divergence: str,
) -> torch.Tensor:
    counts = {"mask": mask, "normalizer": float(max(counted, 1)), "vocab_size": vocab_size}
    if isinstance(targets, TopTargets):
        return head_ops.linear_sparse_kl_div(hidden, head, targets.indices, targets.logprobs, tail="bucket", **counts)
    given = {"teacher_lse": targets.lse, "divergence": divergence}
    return head_ops.linear_kl_div(hidden, head, targets.hidden, targets.head, **given, **counts)
