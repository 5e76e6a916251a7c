"""The losses as ``nn.Module``: options at construction, tensors in ``forward``.

They hold no parameters. ``forward`` takes hidden states and the weights of the heads, so that no logits exist::

    loss = LinearKLDivLoss(temperature=2.0, student_softcap=30.0, teacher_softcap=30.0)
    loss(student_hidden, student.lm_head.weight, teacher_hidden, teacher.lm_head.weight, mask).backward()
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from undo_kernels.ops import arguments, checks
from undo_kernels.ops.cross_entropy import linear_cross_entropy
from undo_kernels.ops.kl import check_divergence, linear_kl_div


class _Loss(nn.Module):
    """A loss whose options are keyword arguments of a function of :mod:`undo_kernels.ops`, checked at construction."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        checks.choice("reduction", options["reduction"], ("mean", "sum", "none"))
        checks.vocabulary(options["vocab_size"], None)
        if "ignore_index" in options:
            checks.ignore_index(options["ignore_index"])
        arguments.memory(options["plan"], options["workspace_bytes"])
        self._names = tuple(options)
        for name, value in options.items():
            setattr(self, name, value)

    def options(self) -> dict[str, Any]:
        """Returns the options as keyword arguments of the function."""
        return {name: getattr(self, name) for name in self._names}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options().items() if value is not None)


class LinearKLDivLoss(_Loss):
    """Divergence between a teacher's and a student's next-token distributions, from hidden states and heads.

    The module form of :func:`undo_kernels.ops.linear_kl_div`, which describes the arithmetic, memory and infinities. The
    forward divergence is the distillation loss of arXiv 2506.06278.

    Args:
        divergence: ``forward`` KL(t || s), ``reverse`` KL(s || t), or ``jsd``.
        beta: weight of the JSD, strictly between 0 and 1.
        temperature: divides both logits, > 0. There is no factor of the temperature squared.
        student_scale: factor of the student's products.
        teacher_scale: factor of the teacher's products.
        student_softcap: ``c`` of ``c * tanh(z / c)``, or None.
        teacher_softcap: likewise.
        vocab_size: entries of the heads from here on are padding; None: the heads have the same entries, and all take part.
        label_weight: factor of the student's cross-entropy, which ``labels`` add, >= 0.
        ignore_index: label that does not count.
        reduction: ``mean`` over counted tokens, ``sum`` or ``none``.
        plan: auto, direct, chunk or recompute.
        workspace_bytes: bound on the memory for logits; None follows from shapes and dtypes.

    Shapes:
        ``student_hidden`` ``[..., d_s]``, ``student_weight`` ``[V, d_s]``, ``teacher_hidden`` ``[..., d_t]``,
        ``teacher_weight`` ``[V, d_t]``, ``mask`` ``[...]``. The loss is a scalar, or ``[...]`` with ``reduction="none"``.

    Dtypes: float32, bfloat16, float16 or float64, which may differ; the loss is float32, or float64 where an input is.

    Raises:
        ValueError: at construction a wrong option, in ``forward`` a wrong shape, dtype, device or value; it names the argument.

    Example:
        >>> loss = LinearKLDivLoss(temperature=2.0)
        >>> h, w = torch.randn(2, 5, 8, requires_grad=True), torch.randn(11, 8)
        >>> float(loss(h, w, h.detach(), w))
        0.0
    """

    def __init__(
        self,
        *,
        divergence: Literal["forward", "reverse", "jsd"] = "forward",
        beta: float = 0.5,
        temperature: float = 1.0,
        student_scale: float = 1.0,
        teacher_scale: float = 1.0,
        student_softcap: float | None = None,
        teacher_softcap: float | None = None,
        vocab_size: int | None = None,
        label_weight: float = 0.0,
        ignore_index: int = -100,
        reduction: arguments.Reduction = "mean",
        plan: Literal["auto", "direct", "chunk", "recompute"] = "auto",
        workspace_bytes: int | None = None,
    ) -> None:
        check_divergence(divergence, beta, label_weight)
        arguments.check_shape("student_", student_scale, student_softcap, temperature)
        arguments.check_shape("teacher_", teacher_scale, teacher_softcap, temperature)
        super().__init__(
            divergence=divergence,
            beta=beta,
            temperature=temperature,
            student_scale=student_scale,
            teacher_scale=teacher_scale,
            student_softcap=student_softcap,
            teacher_softcap=teacher_softcap,
            vocab_size=vocab_size,
            label_weight=label_weight,
            ignore_index=ignore_index,
            reduction=reduction,
            plan=plan,
            workspace_bytes=workspace_bytes,
        )

    def forward(
        self,
        student_hidden: torch.Tensor,
        student_weight: torch.Tensor,
        teacher_hidden: torch.Tensor,
        teacher_weight: torch.Tensor,
        mask: torch.Tensor | None = None,
        *,
        token_weight: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        student_bias: torch.Tensor | None = None,
        teacher_bias: torch.Tensor | None = None,
        teacher_lse: torch.Tensor | None = None,
        normalizer: float | torch.Tensor | None = None,
        max_counted: int | None = None,
        accumulate_into: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns the loss; the keyword arguments are those of :func:`undo_kernels.ops.linear_kl_div`."""
        return linear_kl_div(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            mask=mask,
            token_weight=token_weight,
            labels=labels,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            teacher_lse=teacher_lse,
            normalizer=normalizer,
            max_counted=max_counted,
            accumulate_into=accumulate_into,
            **self.options(),
        )


class LinearCrossEntropyLoss(_Loss):
    """Cross-entropy of labels, from hidden states and a head, in the place of a projection and ``nn.CrossEntropyLoss``.

    The module form of :func:`undo_kernels.ops.linear_cross_entropy`, which describes the arithmetic, memory and infinities. The
    caller shifts the labels.

    Args:
        ignore_index: label that does not count.
        temperature: divides the logits, > 0.
        scale: factor of the products.
        softcap: ``c`` of ``c * tanh(z / c)``, or None.
        vocab_size: entries of the head from here on are padding; None: all take part.
        reduction: ``mean`` over counted tokens, ``sum`` or ``none``.
        plan: auto, direct, chunk or recompute.
        workspace_bytes: bound on the memory for logits; None follows from shapes and dtypes.

    Shapes:
        ``hidden`` ``[..., d]``, ``weight`` ``[V, d]``, ``labels`` ``[...]`` integers, ``mask`` ``[...]``. The loss is a scalar,
        or ``[...]`` with ``reduction="none"``.

    Dtypes: float32, bfloat16, float16 or float64, which may differ; the loss is float32, or float64 where an input is.

    Raises:
        ValueError: at construction a wrong option, in ``forward`` a wrong shape, dtype, device or value; it names the argument.

    Example:
        >>> loss = LinearCrossEntropyLoss(reduction="none")
        >>> loss(torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([1, -100]))
        tensor([1.3863, 0.0000])
    """

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        temperature: float = 1.0,
        scale: float = 1.0,
        softcap: float | None = None,
        vocab_size: int | None = None,
        reduction: arguments.Reduction = "mean",
        plan: Literal["auto", "direct", "chunk", "recompute"] = "auto",
        workspace_bytes: int | None = None,
    ) -> None:
        arguments.check_shape("", scale, softcap, temperature)
        super().__init__(
            ignore_index=ignore_index,
            temperature=temperature,
            scale=scale,
            softcap=softcap,
            vocab_size=vocab_size,
            reduction=reduction,
            plan=plan,
            workspace_bytes=workspace_bytes,
        )

    def forward(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        mask: torch.Tensor | None = None,
        *,
        token_weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        normalizer: float | torch.Tensor | None = None,
        max_counted: int | None = None,
        accumulate_into: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns the loss; the keyword arguments are those of :func:`undo_kernels.ops.linear_cross_entropy`."""
        return linear_cross_entropy(
            hidden,
            weight,
            labels,
            mask=mask,
            token_weight=token_weight,
            bias=bias,
            normalizer=normalizer,
            max_counted=max_counted,
            accumulate_into=accumulate_into,
            **self.options(),
        )
