"""Inputs (:class:`Problem`) and outputs (:class:`Result`) of one call of the vocabulary losses, the same for every backend.

Tokens are flattened over the batch. The losses differ only in the target distribution::

    own          no teacher: the divergence is 0
    uniform      KL(U || s), U uniform over the vocabulary
    forward      KL(t || s)
    reverse      KL(s || t)
    jsd          beta KL(t || m) + (1 - beta) KL(s || m),  m = beta t + (1 - beta) s
    bucket       KL(t || s), t known at k entries, and the sum of its other probabilities
    renormalize  KL(t || s), both as distributions over the k known entries

Each of them can also return the student's negative log-likelihood, computed from the same matrix products::

    nll = lse_s - z_s[label]            (lse_s alone where a token has no label)
    total = sum_i factor_i divergence_i + label_factor_i nll_i
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from undo_kernels.projection import GivenLogits, Projection
from undo_kernels.vocabulary_shard import VocabularyShard

DENSE = ("forward", "reverse", "jsd")
SPARSE = ("bucket", "renormalize")
TARGETS = ("own", "uniform", *DENSE, *SPARSE)


@dataclass(frozen=True)
class Problem:
    """Inputs and options of one call.

    Attributes:
        student: hidden states ``[tokens, d_s]`` and their head, or precomputed logits ``[tokens, V]``.
        target: one of ``TARGETS``.
        factor: ``[tokens]`` float, ``d total / d divergence``; where it is 0 and the label counts, the token is ``unseen``.
        label_factor: ``[tokens]`` float, ``d total / d nll``; None: no nll is computed.
        labels: ``[tokens]`` int64, negative for no label; a label outside the vocabulary makes the token's nll NaN. None: no token
            has one.
        counted: ``[tokens]`` bool; other tokens are not read, and their outputs and gradients are 0. None: every token.
        teacher: hidden states and head, or logits, for the dense targets; None for the others.
        indices: ``[tokens, k]`` int64, the known vocabulary entries for the sparse targets; -1 for padding.
        logprobs: ``[tokens, k]`` float, the teacher's log-probabilities at ``indices``.
        beta: the teacher's weight in the mixture of jsd.
        lse_s: ``[tokens]``, the student's log-sum-exps if an earlier call computed them.
        lse_t: ``[tokens]``, the teacher's, likewise.
        needs: which gradients of ``total`` to compute: hidden states (or logits), weight, bias.
        statistics: whether to compute teacher entropy and top-1 agreement.
        max_counted: upper bound on the number of counted tokens, guaranteed by the caller.
        plan: ``auto`` or the name of one of the backend's plans.
        workspace_bytes: bound on memory beyond inputs, outputs and O(tokens) floats; None: the plan's default.
        inplace: whether the gradient may overwrite precomputed logits.
        earlier: earlier gradient of the weight, like it, which the weight's gradient is added to in place; None: there is none.
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
    inplace: bool = False
    earlier: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        return self.student.tokens

    @property
    def shard(self) -> VocabularyShard | None:
        """Part of the vocabulary that the heads hold; None: all of it. Labels and indices count over the whole vocabulary."""
        return self.student.shard

    @property
    def unseen(self) -> torch.Tensor | None:
        """The tokens whose label alone may count, ``[tokens]`` bool; None: the teacher's logits are not given, or no label counts.

        A backend takes the teacher's logits as 0 there. Otherwise a NaN of theirs would reach the gradient: the student's
        probability is computed beside the teacher's, and 0 * NaN is NaN. A teacher's hidden states have been cleared already.
        """
        return self.factor == 0 if isinstance(self.teacher, GivenLogits) and self.label_factor is not None else None

    @property
    def repeated(self) -> bool:
        """Whether an earlier call returned the losses already, and only the gradient is wanted."""
        return self.lse_s is not None

    def taken(self) -> tuple[Problem, torch.Tensor | slice]:
        """Returns the problem restricted to the counted tokens, and their indices; waits for the GPU to count them."""
        if self.counted is None or bool(self.counted.all()):
            return replace(self, counted=None), slice(None)
        tokens = self.counted.nonzero().squeeze(-1)
        return self._with_tokens(lambda hidden: hidden[tokens], lambda tensor: tensor[tokens]), tokens

    def cleared(self) -> Problem:
        """Returns the problem on all tokens, with nothing in uncounted ones that could spread: hidden states of 0, no known entries."""
        if self.counted is None:
            return self
        keep = self.counted[:, None]
        problem = self if self.indices is None else replace(self, indices=torch.where(keep, self.indices, -1))
        return problem._with_tokens(lambda hidden: torch.where(keep, hidden, torch.zeros_like(hidden)), lambda tensor: tensor)

    def _with_tokens(
        self, hidden: Callable[[torch.Tensor], torch.Tensor], other: Callable[[torch.Tensor], torch.Tensor]
    ) -> Problem:
        names = ("factor", "label_factor", "labels", "indices", "logprobs", "lse_s", "lse_t")
        tensors = {name: other(getattr(self, name)) for name in names if getattr(self, name) is not None}
        student = replace(self.student, hidden=hidden(self.student.hidden))
        teacher = None if self.teacher is None else replace(self.teacher, hidden=hidden(self.teacher.hidden))
        return replace(self, student=student, teacher=teacher, counted=None, **tensors)


class Result(NamedTuple):
    """Outputs of one call; tokens that are not counted are 0.

    Attributes:
        total: 0-d float32.
        divergence: ``[tokens]`` float32, >= 0.
        nll: ``[tokens]`` float32; empty unless ``label_factor`` was given.
        lse_s: ``[tokens]`` float32.
        lse_t: ``[tokens]`` float32; empty unless the target is dense.
        teacher_entropy: ``[tokens]`` float32; empty unless ``statistics``.
        top1_agreement: ``[tokens]`` float32; empty unless ``statistics``.
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
    d_hidden: torch.Tensor
    d_weight: torch.Tensor
    d_bias: torch.Tensor


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of a gradient before ``grad_output`` multiplies it.

    float16 inputs get float32 gradients: a loss scale could take float16 out of its range.
    """
    return torch.float32 if dtype == torch.float16 else dtype
