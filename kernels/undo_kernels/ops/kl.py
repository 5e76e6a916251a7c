"""Divergences between a teacher's and a student's next-token distributions, from hidden states or from logits."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch

from undo_kernels.ops import arguments, checks
from undo_kernels.ops.dispatch import LossReduction, reduced_loss
from undo_kernels.ops.layout import check_apart
from undo_kernels.ops.vocabulary_parallel import check_same_cut
from undo_kernels.projection import Projection


class KLStats(NamedTuple):
    """Detached statistics of :func:`linear_kl_div` and :func:`kl_div`; zero where a token is masked or has weight 0.

    Attributes:
        lse_s: the student's log-sum-exps, ``[...]``.
        lse_t: the teacher's, ``[...]``.
        teacher_entropy: entropy of the teacher in nats, ``[...]``.
        top1_agreement: 1 where both have the same most likely entry, else 0, ``[...]``.
    """

    lse_s: torch.Tensor
    lse_t: torch.Tensor
    teacher_entropy: torch.Tensor
    top1_agreement: torch.Tensor


def linear_kl_div(
    student_hidden: torch.Tensor,
    student_weight: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_weight: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    token_weight: torch.Tensor | None = None,
    divergence: Literal["forward", "reverse", "jsd"] = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    student_bias: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    vocab_size: int | None = None,
    teacher_lse: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    label_weight: float = 0.0,
    ignore_index: int = -100,
    reduction: arguments.Reduction = "mean",
    normalizer: float | torch.Tensor | None = None,
    return_stats: bool = False,
    max_counted: int | None = None,
    plan: str = "auto",
    workspace_bytes: int | None = None,
    accumulate_into: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, KLStats]:
    """Computes a divergence between a teacher's and a student's next-token distributions.

    Forward ``KL(t || s)`` (the published distillation loss, arXiv 2506.06278), reverse ``KL(s || t)``, or
    ``jsd = beta * KL(t || m) + (1 - beta) * KL(s || m)`` with ``m = beta * t + (1 - beta) * s``. No ``T**2`` factor.
    It is evaluated in difference form, so it is never negative, and accurate where student and teacher nearly agree. See
    :mod:`undo_kernels.ops` for the options that all losses share, and for memory, gradients and infinities.

    Args:
        student_hidden: ``[..., d_s]``; gradient.
        student_weight: ``[V, d_s]``; gradient. It may be sharded by vocabulary entries, and then so must the teacher's be.
        teacher_hidden: ``[..., d_t]``; no gradient.
        teacher_weight: ``[V, d_t]``; no gradient.
        mask: ``[...]`` bool, True counts.
        token_weight: ``[...]`` float.
        divergence: forward, reverse or jsd.
        beta: weight of the JSD, strictly between 0 and 1.
        temperature: > 0, divides both logits.
        student_scale: factor on the student's products.
        teacher_scale: factor on the teacher's products.
        student_softcap: ``c`` > 0 or None.
        teacher_softcap: ``c`` > 0 or None.
        student_bias: ``[V]``; gradient.
        teacher_bias: ``[V]``; no gradient.
        vocab_size: entries from here on are padding.
        teacher_lse: ``[...]`` from :func:`linear_lse` with the teacher's options.
        labels: ``[...]`` integers. They add ``label_weight`` times the student's cross-entropy, averaged over its own counted tokens
            (those whose label is not ``ignore_index``), or over ``normalizer``.
        label_weight: factor of the cross-entropy, >= 0.
        ignore_index: label that does not count.
        reduction: mean, sum or none.
        normalizer: replaces the mean's denominator.
        return_stats: also return :class:`KLStats`.
        max_counted: upper bound on counted tokens.
        plan: auto, direct, chunk or recompute.
        workspace_bytes: bound on the memory for logits.
        accumulate_into: the parameter ``student_weight``. Its gradient is then added to in place; see :mod:`undo_kernels.ops`.

    Returns:
        A scalar, or ``[...]`` with ``reduction="none"``, in float32 (float64 where an input is); with ``return_stats`` a pair.

    Example:
        >>> h, w = torch.randn(2, 5, 8, requires_grad=True), torch.randn(11, 8)
        >>> float(linear_kl_div(h, w, h.detach(), w, student_softcap=30.0, teacher_softcap=30.0))
        0.0

    Raises:
        ValueError: a wrong shape, dtype, device or value; it names the argument.
    """
    checks.head("student_", student_hidden, student_weight, student_bias)
    checks.head("teacher_", teacher_hidden, teacher_weight, teacher_bias)
    leading = student_hidden.shape[:-1]
    if teacher_hidden.shape[:-1] != leading:
        checks.fail("teacher_hidden", f"shape {tuple(teacher_hidden.shape)}", f"{(*leading, 'd_t')}, the student's tokens")
    checks.same_device("teacher_hidden", teacher_hidden, student_hidden)
    size = checks.vocabulary(vocab_size, min(student_weight.shape[0], teacher_weight.shape[0]))
    if size is None and student_weight.shape[0] != teacher_weight.shape[0]:
        got = f"{teacher_weight.shape[0]} entries"
        checks.fail("teacher_weight", got, f"the student's {student_weight.shape[0]}, or vocab_size where the rest is padding")
    student = arguments.projection(
        student_hidden,
        student_weight,
        student_bias,
        student_scale,
        student_softcap,
        temperature,
        size,
        "student_",
        accumulate_into,
    )
    teacher = arguments.projection(
        teacher_hidden, teacher_weight, teacher_bias, teacher_scale, teacher_softcap, temperature, size, "teacher_"
    )
    check_same_cut(student.shard, teacher.shard, student_weight.shape[0], teacher_weight.shape[0])
    by = LossReduction.checked(leading, student_hidden.device, token_weight, reduction, normalizer, max_counted)
    memory = arguments.memory(plan, workspace_bytes)
    return _kl(
        student, teacher, by, mask, divergence, beta, teacher_lse, labels, label_weight, ignore_index, return_stats, memory
    )


def kl_div(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    token_weight: torch.Tensor | None = None,
    divergence: Literal["forward", "reverse", "jsd"] = "forward",
    beta: float = 0.5,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    teacher_lse: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    label_weight: float = 0.0,
    ignore_index: int = -100,
    reduction: arguments.Reduction = "mean",
    normalizer: float | torch.Tensor | None = None,
    return_stats: bool = False,
    max_counted: int | None = None,
    plan: str = "auto",
    workspace_bytes: int | None = None,
    inplace_grad: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, KLStats]:
    """Computes :func:`linear_kl_div` of logits that exist already, with scale, softcap and bias applied.

    Args:
        student_logits: ``[..., V]``; gradient.
        teacher_logits: ``[..., V]``; no gradient.
        inplace_grad: lets the backward overwrite ``student_logits`` with their gradient, which saves a second ``[..., V]`` array. Code
            that reads the logits afterwards reads the gradient. Plain PyTorch does not use the permission. Refused for logits whose
            elements share memory (``expand``), and for a teacher's that share the student's.
        mask: this and all further arguments as in :func:`linear_kl_div`.

    Example:
        >>> z = torch.randn(3, 7)
        >>> bool(kl_div(z, z + 1.0) < 1e-12)
        True
    """
    checks.float_tensor("student_logits", student_logits, "[..., V]")
    checks.float_tensor("teacher_logits", teacher_logits, "[..., V]")
    if teacher_logits.shape != student_logits.shape:
        checks.fail("teacher_logits", f"shape {tuple(teacher_logits.shape)}", f"{tuple(student_logits.shape)}, the student's")
    checks.same_device("teacher_logits", teacher_logits, student_logits)
    size = checks.vocabulary(vocab_size, student_logits.shape[-1])
    student = arguments.given_logits("temperature", student_logits, temperature, size)
    teacher = arguments.given_logits("temperature", teacher_logits, temperature, size)
    by = LossReduction.checked(
        student_logits.shape[:-1], student_logits.device, token_weight, reduction, normalizer, max_counted
    )
    memory = {**arguments.memory(plan, workspace_bytes), "inplace": checks.flag("inplace_grad", inplace_grad)}
    if inplace_grad and not torch.compiler.is_compiling():  # a graph overwrites no logits
        written = {"student_logits": student_logits, "teacher_logits": teacher_logits}
        check_apart("inplace_grad", written, {"student_logits"})
    return _kl(
        student, teacher, by, mask, divergence, beta, teacher_lse, labels, label_weight, ignore_index, return_stats, memory
    )


def check_divergence(divergence: Any, beta: Any, label_weight: Any) -> None:
    """Checks the options that choose the loss."""
    checks.choice("divergence", divergence, ("forward", "reverse", "jsd"))
    if divergence == "jsd":
        checks.number("beta", beta, "a number strictly inside (0, 1)", 0, 1, open_ends=True)
    checks.number("label_weight", label_weight, "a finite number >= 0", 0)


def _kl(
    student: Projection,
    teacher: Projection,
    reduction: LossReduction,
    mask: torch.Tensor | None,
    divergence: str,
    beta: float,
    teacher_lse: torch.Tensor | None,
    labels: torch.Tensor | None,
    label_weight: float,
    ignore_index: int,
    return_stats: bool,
    memory: dict[str, Any],
) -> torch.Tensor | tuple[torch.Tensor, KLStats]:
    device, leading = student.hidden.device, reduction.leading
    check_divergence(divergence, beta, label_weight)
    checks.flag("return_stats", return_stats)
    counted, labelled, weight = arguments.mask_of(mask, leading, device), None, None
    if labels is not None and label_weight:
        labels, labelled = arguments.labels_of(labels, leading, device, student.entries, ignore_index, None)
        weight = float(label_weight)
    if teacher_lse is not None:
        teacher_lse = checks.per_token("teacher_lse", teacher_lse, leading, "float", device).reshape(-1).detach()
    loss, statistics = reduced_loss(
        student,
        divergence,
        reduction,
        counted=counted,
        labels=None if weight is None else labels,
        labelled=labelled,
        label_weight=weight,
        teacher=teacher,
        beta=float(beta) if divergence == "jsd" else 0.5,
        lse_t=teacher_lse,
        statistics=return_stats,
        **memory,
    )
    loss = loss.view(leading) if reduction.kind == "none" else loss
    if not return_stats:
        return loss
    return loss, KLStats(**{name: value.view(leading) for name, value in statistics.items()})
