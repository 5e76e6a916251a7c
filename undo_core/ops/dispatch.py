"""From checked arguments to a loss: which tokens count, which implementation runs, and how rows become one number.

Plain PyTorch (the reference, and the direct plan of small vocabularies) is differentiated by autograd. Every other backend is
the one ``torch.library`` op of ``undo_kernels.torch_ops``, which computes its gradient in the forward.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from undo_kernels.library import choose
from undo_kernels.plan import prefers_direct
from undo_kernels.problem import Problem
from undo_kernels.projection import GivenLogits, Projection
from undo_kernels.reference.losses import row_losses
from undo_kernels.torch_ops import arguments

from undo_core.ops import checks


@dataclasses.dataclass(frozen=True)
class Tokens:
    """How rows become one number; the arguments that every loss shares, checked.

    Attributes:
        leading: shape of the tokens.
        weight: ``[rows]`` float or None.
        reduction: mean, sum or none.
        normalizer: replaces the mean's denominator.
        max_counted: bound on the counted rows.
    """

    leading: torch.Size
    weight: torch.Tensor | None
    reduction: str
    normalizer: float | torch.Tensor | None
    max_counted: int | None

    @classmethod
    def checked(
        cls, leading: torch.Size, device: torch.device, token_weight: Any, reduction: Any, normalizer: Any, max_counted: Any
    ) -> Tokens:
        """Raises a ValueError that names the argument."""
        checks.choice("reduction", reduction, ("mean", "sum", "none"))
        if isinstance(normalizer, torch.Tensor):
            if normalizer.ndim != 0:
                checks.fail("normalizer", f"shape {tuple(normalizer.shape)}", "a number or a 0-d tensor")
        elif normalizer is not None and not (checks.number("normalizer", normalizer, "a number > 0", 0) > 0):
            checks.fail("normalizer", normalizer, "a number > 0")
        if max_counted is not None and (isinstance(max_counted, bool) or not isinstance(max_counted, int) or max_counted < 0):
            checks.fail("max_counted", max_counted, "an integer >= 0, or None")
        weight = None
        if token_weight is not None:
            weight = checks.per_token("token_weight", token_weight, leading, "float", device).reshape(-1).detach()
        return cls(leading, weight, reduction, normalizer, max_counted)

    def factor(self, counted: torch.Tensor | None, rows: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """``[rows]``: what each row's loss is multiplied by in the reduced one; NaN where more count than were vouched for."""
        factor = torch.ones(rows, device=device, dtype=dtype) if self.weight is None else self.weight.to(dtype)
        if counted is not None:
            factor = torch.where(counted, factor, 0.0)
        if self.max_counted is not None:
            count = rows if counted is None else counted.sum()
            factor = torch.where(torch.as_tensor(count, device=device) > self.max_counted, torch.nan, factor)
        if self.reduction != "mean":
            return factor
        if self.normalizer is not None:
            return factor / self.normalizer
        return factor / (max(rows, 1) if counted is None else counted.sum().clamp_min(1))


def reduced_loss(
    student: Projection,
    target: str,
    tokens: Tokens,
    *,
    counted: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    labelled: torch.Tensor | None = None,
    label_weight: float | None = None,
    teacher: Projection | None = None,
    indices: torch.Tensor | None = None,
    logprobs: torch.Tensor | None = None,
    beta: float = 0.5,
    lse_t: torch.Tensor | None = None,
    statistics: bool = False,
    plan: str = "auto",
    workspace_bytes: int | None = None,
    filter_below: float = 0.0,
    inplace: bool = False,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a target, and detached statistics.

    Args:
        student: hidden states ``[rows, d]`` and head, or logits ``[rows, V]``.
        target: see ``undo_kernels.problem``.
        tokens: reduction and weights.
        counted: ``[rows]`` bool, the rows of the divergence; None: all.
        labels: ``[rows]`` int64, negative where a row has none.
        labelled: ``[rows]`` bool, the rows of the negative log-likelihood; None: all.
        label_weight: its factor; None: no such term.
        teacher: of a dense target.
        indices: and ``logprobs``, ``[rows, k]``, of a sparse target.
        beta: of jsd.
        lse_t: ``[rows]``, the teacher's log-sum-exps where known.
        statistics: whether the teacher's entropy and the top-1 agreement are wanted.
        plan: auto, direct, chunk or recompute.
        workspace_bytes: bound on the workspace.
        filter_below: bound of the block filter.
        inplace: whether the gradient may overwrite given logits.
    """
    device, rows = student.hidden.device, student.rows
    wide = torch.float64 in {t.dtype for t in (student.hidden, student.weight)} | (
        {teacher.hidden.dtype, teacher.weight.dtype} if teacher is not None else set()
    )
    dtype = torch.float64 if wide else torch.float32
    either = counted if label_weight is None or target == "own" else _either(counted, labelled)
    either = labelled if target == "own" else either
    if tokens.weight is not None:  # like a masked row, so that nothing of it, NaN included, reaches a gradient
        weighted = tokens.weight != 0
        if not (checks.looks(weighted) and weighted.all()):
            either = weighted if either is None else either & weighted
    grad = torch.is_grad_enabled()
    parts = (student.hidden, student.weight, student.bias)
    given = isinstance(student, GivenLogits)
    needs = tuple(grad and t is not None and t.requires_grad and not (given and n) for n, t in enumerate(parts))
    problem = Problem(
        student=student,
        target=target,
        factor=tokens.factor(counted, rows, device, dtype),
        label_factor=None if label_weight is None else label_weight * tokens.factor(labelled, rows, device, dtype),
        labels=labels,
        counted=either,
        teacher=teacher,
        indices=indices,
        logprobs=logprobs,
        beta=beta,
        lse_t=lse_t,
        needs=needs,
        statistics=statistics,
        max_counted=tokens.max_counted,
        plan=plan,
        workspace_bytes=workspace_bytes,
        filter_below=filter_below,
    )
    backend = choose_backend(problem, wide, device)
    if backend == "reference":
        return _plain(problem, tokens)
    if tokens.reduction == "none" or (inplace and needs[0]):
        return _rows(problem, tokens, backend, inplace)
    results = torch.ops.undo.vocab_loss(*arguments(problem, backend))
    return results[0], _statistics(results)


def choose_backend(problem: Problem, wide: bool, device: torch.device) -> str:
    """Where the problem runs; plain PyTorch for float64, for ``plan="direct"`` and where its few large calls win."""
    if wide or problem.plan == "direct":
        return "reference"
    backend = choose("vocab_loss", device)
    free = problem.plan == "auto" and problem.workspace_bytes is None
    return "reference" if free and prefers_direct(problem.rows, problem.student.vocabulary, backend) else backend


def _rows(problem: Problem, tokens: Tokens, backend: str, inplace: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    problem = dataclasses.replace(problem, plan="inplace") if inplace and problem.needs[0] else problem
    results = torch.ops.undo.vocab_loss_rows(*arguments(problem, backend))
    loss = torch.where(problem.factor == 0, 0.0, problem.factor * results[1])
    if problem.label_factor is not None:
        loss = loss + torch.where(problem.label_factor == 0, 0.0, problem.label_factor * results[2])
    return loss if tokens.reduction == "none" else loss.sum(), _statistics(results)


def _statistics(results: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    names = ("lse_s", "lse_t", "teacher_entropy", "top1_agreement", "filtered")
    return {name: value.detach() for name, value in zip(names, results[3:8], strict=True)}


def _plain(problem: Problem, tokens: Tokens) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """By autograd. Rows that do not count are taken out; where the host cannot count them, they are overwritten with zeros."""
    counted = problem.counted
    if checks.looks(problem.student.hidden):
        p, rows = problem.taken()
    else:
        p, rows = problem.cleared(), slice(None)
    divergence, nll, statistics = row_losses(p)

    def weighted(values: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        if counted is not None:  # a row may count for one of the two losses alone, and be infinite in the other
            values = values.masked_fill(factor == 0, 0.0)
        return values * factor

    loss = weighted(divergence, p.factor) if p.target != "own" else None
    if p.label_factor is not None:
        nll = weighted(nll, p.label_factor)
        loss = nll if loss is None else loss + nll

    def spread(values: torch.Tensor) -> torch.Tensor:
        if isinstance(rows, slice):
            return values if counted is None else torch.where(counted, values, 0.0)
        return values.new_zeros(problem.rows).index_put((rows,), values)

    statistics = {name: spread(value) for name, value in statistics.items()}
    statistics["filtered"] = problem.factor.new_zeros(2)
    return spread(loss) if tokens.reduction == "none" else loss.sum(), statistics


def _either(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return None if a is None or b is None else a | b
