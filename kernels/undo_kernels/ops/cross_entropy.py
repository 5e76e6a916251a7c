"""Cross-entropy, the log-sum-exp of the logits, and the divergence from the uniform distribution."""

from __future__ import annotations

import torch

from undo_kernels.ops import arguments, checks
from undo_kernels.ops.dispatch import LossReduction, reduced_loss


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    ignore_index: int = -100,
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
    """Computes the cross-entropy of ``labels``, ``lse(z) - z[label]``, in nats.

    See :mod:`undo_kernels.ops` for the options that all losses share, and for dtypes, memory and gradients.

    Args:
        hidden: ``[..., d]``; gradient.
        weight: ``[V, d]``; gradient. It may be sharded by vocabulary entries.
        labels: ``[...]`` integers; the caller shifts them.
        ignore_index: label that does not count.
        mask: ``[...]`` bool, True counts.
        token_weight: ``[...]`` float.
        temperature: divides the logits, > 0.
        scale: factor on the products.
        softcap: ``c`` > 0 or None.
        bias: ``[V]``; gradient.
        vocab_size: entries from here on are padding.
        reduction: mean, sum or none.
        normalizer: replaces the mean's denominator.
        max_counted: upper bound on counted tokens.
        plan: auto, direct, chunk or recompute.
        workspace_bytes: bound on the memory for logits.
        accumulate_into: the parameter ``weight``. Its gradient is then added to in place; see :mod:`undo_kernels.ops`.

    Returns:
        A scalar, or ``[...]`` with ``reduction="none"``.
    """
    checks.head("", hidden, weight, bias)
    leading = hidden.shape[:-1]
    size = checks.vocabulary(vocab_size, weight.shape[0])
    projection = arguments.projection(hidden, weight, bias, scale, softcap, temperature, size, accumulate_into=accumulate_into)
    by = LossReduction.checked(leading, hidden.device, token_weight, reduction, normalizer, max_counted)
    counted = arguments.mask_of(mask, leading, hidden.device)
    labels, labelled = arguments.labels_of(labels, leading, hidden.device, projection.entries, ignore_index, counted)
    return arguments.shaped(
        reduced_loss(
            projection,
            "own",
            by,
            labels=labels,
            labelled=labelled,
            label_weight=1.0,
            **arguments.memory(plan, workspace_bytes),
        ),
        by,
    )


def linear_lse(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *,
    scale: float = 1.0,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    plan: str = "auto",
    workspace_bytes: int | None = None,
    accumulate_into: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the log-sum-exp of the logits, ``[...]`` float32 (float64 where an input is); differentiable.

    Args:
        hidden: ``[..., d]``.
        weight: ``[V, d]``.
        scale: this and all further arguments as in :func:`linear_cross_entropy`.
    """
    checks.head("", hidden, weight, bias)
    size = checks.vocabulary(vocab_size, weight.shape[0])
    projection = arguments.projection(hidden, weight, bias, scale, softcap, temperature, size, accumulate_into=accumulate_into)
    leading = hidden.shape[:-1]
    by = LossReduction(leading, None, "none", None, None)
    memory = arguments.memory(plan, workspace_bytes)
    return reduced_loss(projection, "own", by, label_weight=1.0, **memory)[0].view(leading)


def linear_uniform_kl(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *,
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
    """Computes ``KL(U || p) = lse(z) - mean(z) - log V``, the forget loss of MaxEnt (arXiv 2506.06278); ``U`` is uniform.

    Args:
        hidden: ``[..., d]``; gradient.
        weight: ``[V, d]``; gradient.
        mask: this and all further arguments as in :func:`linear_cross_entropy`.
    """
    checks.head("", hidden, weight, bias)
    leading = hidden.shape[:-1]
    size = checks.vocabulary(vocab_size, weight.shape[0])
    projection = arguments.projection(hidden, weight, bias, scale, softcap, temperature, size, accumulate_into=accumulate_into)
    by = LossReduction.checked(leading, hidden.device, token_weight, reduction, normalizer, max_counted)
    counted = arguments.mask_of(mask, leading, hidden.device)
    return arguments.shaped(
        reduced_loss(projection, "uniform", by, counted=counted, **arguments.memory(plan, workspace_bytes)), by
    )
