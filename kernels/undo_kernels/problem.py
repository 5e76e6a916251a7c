"""One call of the vocabulary-loss family, as every backend receives it, and what it gives back.

Rows are tokens, flattened. The members of the family differ in the target distribution alone::

    own          no teacher: the divergence is 0
    uniform      KL(U || s), U uniform over the vocabulary
    forward      KL(t || s)
    reverse      KL(s || t)
    jsd          beta KL(t || m) + (1 - beta) KL(s || m),  m = beta t + (1 - beta) s
    bucket       KL(t || s), t known at k entries and in the sum of the rest
    renormalize  KL(t || s), both as distributions over the k known entries

and every one of them may carry the student's negative log-likelihood on the same products::

    nll = lse_s - z_s[label]            (lse_s alone where a row has no label)
    total = sum_i factor_i divergence_i + label_factor_i nll_i
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from undo_kernels.projection import Projection

DENSE = ("forward", "reverse", "jsd")
SPARSE = ("bucket", "renormalize")
TARGETS = ("own", "uniform", *DENSE, *SPARSE)


@dataclass(frozen=True)
class Problem:
    """What to compute.

    Attributes:
        student: hidden states ``[rows, d_s]`` and their head, or given logits ``[rows, V]``.
        target: one of ``TARGETS``.
        factor: ``[rows]`` float, ``d total / d divergence``.
        label_factor: ``[rows]`` float, ``d total / d nll``; None: no nll is wanted.
        labels: ``[rows]`` int64, negative for none; a label outside the vocabulary makes its nll NaN. None: no row has one.
        counted: ``[rows]`` bool; other rows are not read, and their outputs and gradients are 0. None: every row.
        teacher: of the dense targets.
        indices: ``[rows, k]`` int64 of the sparse targets, -1 for padding.
        logprobs: ``[rows, k]`` float of the sparse targets.
        beta: of jsd.
        lse_s: ``[rows]`` where known from an earlier call.
        lse_t: ``[rows]`` where known.
        needs: which gradients of ``total`` are wanted: hidden (or logits), weight, bias.
        statistics: whether teacher entropy and top-1 agreement are wanted.
        max_counted: bound on the counted rows that the caller vouches for.
        plan: ``auto`` or the name of a plan of the backend.
        workspace_bytes: bound on everything beyond inputs, outputs and O(rows) floats; None: the plan's own default.
        filter_below: blocks of the gradient whose largest entry (before the rows' factors) is below it are skipped; 0: none.
        inplace: whether the gradient may overwrite given logits.
    """

    student: Projection
    target: str
    factor: torch.Tensor
    label_factor: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    counted: torch.Tensor | None = None
    teacher: Projection | None = None
    indices: torch.Tensor | None = None
    logprobs: torch.Tensor | None = None
    beta: float = 0.5
    lse_s: torch.Tensor | None = None
    lse_t: torch.Tensor | None = None
    needs: tuple[bool, bool, bool] = (False, False, False)
    statistics: bool = False
    max_counted: int | None = None
    plan: str = "auto"
    workspace_bytes: int | None = None
    filter_below: float = 0.0
    inplace: bool = False

    @property
    def rows(self) -> int:
        return self.student.rows

    def taken(self) -> tuple[Problem, torch.Tensor | slice]:
        """The counted rows alone, and their indices; the host waits for their number."""
        if self.counted is None or bool(self.counted.all()):
            return replace(self, counted=None), slice(None)
        rows = self.counted.nonzero().squeeze(-1)
        return self._with_rows(lambda hidden: hidden[rows], lambda tensor: tensor[rows]), rows

    def cleared(self) -> Problem:
        """Every row, with zeros for the hidden states of those that are not counted, so that their values cannot spread."""
        if self.counted is None:
            return self
        keep = self.counted[:, None]
        return self._with_rows(lambda hidden: torch.where(keep, hidden, torch.zeros_like(hidden)), lambda tensor: tensor)

    def _with_rows(
        self, hidden: Callable[[torch.Tensor], torch.Tensor], row: Callable[[torch.Tensor], torch.Tensor]
    ) -> Problem:
        names = ("factor", "label_factor", "labels", "indices", "logprobs", "lse_s", "lse_t")
        tensors = {name: row(getattr(self, name)) for name in names if getattr(self, name) is not None}
        student = replace(self.student, hidden=hidden(self.student.hidden))
        teacher = None if self.teacher is None else replace(self.teacher, hidden=hidden(self.teacher.hidden))
        return replace(self, student=student, teacher=teacher, counted=None, **tensors)


class Result(NamedTuple):
    """What came out; rows that were not counted are 0.

    Attributes:
        total: 0-d float32.
        divergence: ``[rows]`` float32, >= 0.
        nll: ``[rows]`` float32; empty unless ``label_factor`` was given.
        lse_s: ``[rows]`` float32.
        lse_t: ``[rows]`` float32; empty unless the target is dense.
        teacher_entropy: ``[rows]`` float32; empty unless statistics were wanted.
        top1_agreement: ``[rows]`` float32; empty unless statistics were wanted.
        filtered: ``[2]`` float32: share of the gradient's entries in skipped blocks, Frobenius norm of what they held.
        d_hidden: like the student's hidden states, in the gradient's dtype; empty unless needed.
        d_weight: like the student's weight, in the gradient's dtype; empty unless needed.
        d_bias: ``[V]``; empty unless needed.
    """

    total: torch.Tensor
    divergence: torch.Tensor
    nll: torch.Tensor
    lse_s: torch.Tensor
    lse_t: torch.Tensor
    teacher_entropy: torch.Tensor
    top1_agreement: torch.Tensor
    filtered: torch.Tensor
    d_hidden: torch.Tensor
    d_weight: torch.Tensor
    d_bias: torch.Tensor


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of a gradient until ``grad_output`` is applied: float16 keeps float32, whose range a loss scale does not leave."""
    return torch.float32 if dtype == torch.float16 else dtype
