"""Turns checked arguments into a loss: decides which tokens count and which backend runs, and reduces their losses to one number.

Autograd differentiates plain PyTorch (the reference backend, and the direct plan where the logits are few). All other backends run
behind one ``torch.library`` op, ``undo::vocab_loss``, which computes its gradients in the forward.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from undo_kernels.library.backends import choose
from undo_kernels.library.vocab_loss import arguments, vocab_loss_tokens_into
from undo_kernels.ops import checks
from undo_kernels.problem import Problem
from undo_kernels.projection import GivenLogits, Projection
from undo_kernels.reference.vocab_loss import token_losses

# Plain PyTorch is faster below so many (token, vocabulary entry) pairs, and below so many vocabulary entries, than each backend. For
# C++ measured on one core with AVX-512: 128 tokens by 1000 entries are even, 8192 by 17 are faster in PyTorch, 8192 by 100 are not.
_DIRECT = {"cpu": (1 << 17, 64), "triton": (1 << 19, 512)}
_BEYOND = 1e30  # a log-sum-exp beside which every probability is 0


@dataclasses.dataclass(frozen=True)
class LossReduction:
    """How the losses of the tokens become one number: the checked arguments that all losses share.

    Attributes:
        leading: shape of the tokens' losses, ``[...]``.
        weight: weights of the tokens, ``[tokens]`` float, or None.
        kind: mean, sum or none.
        normalizer: replaces the denominator of the mean.
        max_counted: upper bound on the counted tokens.
    """

    leading: torch.Size
    weight: torch.Tensor | None
    kind: str
    normalizer: float | torch.Tensor | None
    max_counted: int | None

    @classmethod
    def checked(
        cls, leading: torch.Size, device: torch.device, token_weight: Any, reduction: Any, normalizer: Any, max_counted: Any
    ) -> LossReduction:
        """Builds one from a call's arguments; a wrong one is a ``ValueError`` that names it."""
        checks.choice("reduction", reduction, ("mean", "sum", "none"))
        normalizer = checks.replicated("normalizer", normalizer)
        if isinstance(normalizer, torch.Tensor):
            checks.dense("normalizer", normalizer, "[]")
            wanted = "a number or a 0-d tensor of a float or integer dtype, on the CPU or where the hidden states are"
            if normalizer.ndim != 0 or not (normalizer.is_floating_point() or checks.whole(normalizer)):
                checks.fail("normalizer", f"shape {tuple(normalizer.shape)} and {normalizer.dtype}", wanted)
            if normalizer.device != device and normalizer.device.type != "cpu":
                checks.fail("normalizer", f"device {normalizer.device}", wanted)
            normalizer = normalizer.detach()
        elif normalizer is not None:
            normalizer = checks.positive("normalizer", normalizer)
        if max_counted is not None:
            checks.integer("max_counted", max_counted, "an integer >= 0, or None", 0)
        weight = None
        if token_weight is not None:
            weight = checks.per_token("token_weight", token_weight, leading, "float", device).reshape(-1).detach()
        return cls(leading, weight, reduction, normalizer, max_counted)

    def counting(self, counted: torch.Tensor | None) -> torch.Tensor | None:
        """Returns which tokens count, ``[tokens]`` bool or None for all: those of ``counted`` whose weight is not 0.

        A token of weight 0 is like a masked one, so that nothing of it, NaN included, reaches a gradient.
        """
        if self.weight is None:
            return counted
        weighted = self.weight != 0
        if checks.looks(weighted) and weighted.all():
            return counted
        return weighted if counted is None else counted & weighted

    def factor(self, counted: torch.Tensor | None, tokens: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """Returns each token's factor in the reduced loss, ``[tokens]``; NaN if more tokens count than ``max_counted``."""
        factor = torch.ones(tokens, device=device, dtype=dtype) if self.weight is None else self.weight.to(dtype)
        if counted is not None:
            factor = torch.where(counted, factor, 0.0)
        if self.max_counted is not None:
            if counted is not None:
                factor = torch.where(counted.sum() > self.max_counted, torch.nan, factor)
            elif tokens > self.max_counted:  # decided on the host: a copy to the device would wait for it
                factor = torch.full_like(factor, torch.nan)
        if self.kind != "mean":
            return factor
        if self.normalizer is not None:
            return factor / self.normalizer
        return factor / (max(tokens, 1) if counted is None else counted.sum().clamp_min(1))


def reduced_loss(
    student: Projection,
    target: str,
    reduction: LossReduction,
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
    inplace: bool = False,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Returns the loss of a target, and detached statistics.

    Args:
        student: hidden states ``[tokens, d]`` and head, or logits ``[tokens, V]``.
        target: see ``undo_kernels.problem``.
        tokens: reduction and weights.
        counted: ``[tokens]`` bool, the tokens that the divergence counts; None: all.
        labels: ``[tokens]`` int64, negative where a token has none.
        labelled: ``[tokens]`` bool, the tokens that the negative log-likelihood counts; None: all.
        label_weight: factor of the negative log-likelihood; None: the loss has no such term.
        teacher: hidden states and head, or logits, of a dense target.
        indices: known vocabulary entries of a sparse target, ``[tokens, k]``.
        logprobs: their log-probabilities, ``[tokens, k]``.
        beta: weight of the JSD.
        lse_t: the teacher's log-sum-exps where known, ``[tokens]``.
        statistics: whether to compute the teacher's entropy and the top-1 agreement.
        plan: auto, direct, chunk or recompute.
        workspace_bytes: bound on the workspace.
        inplace: whether the gradient may overwrite given logits.
    """
    device, tokens = student.hidden.device, student.tokens
    wide = torch.float64 in {t.dtype for t in (student.hidden, student.weight)} | (
        {teacher.hidden.dtype, teacher.weight.dtype} if teacher is not None else set()
    )
    dtype = torch.float64 if wide else torch.float32
    either = counted if label_weight is None or target == "own" else _either(counted, labelled)
    either = labelled if target == "own" else either
    either = reduction.counting(either)
    unseen = None  # the tokens whose label alone counts, where nothing of the teacher, NaN included, may reach it
    if teacher is not None and counted is not None and label_weight is not None:
        unseen = ~counted if either is None else either & ~counted
        if not isinstance(teacher, GivenLogits):  # see Problem.unseen for these
            teacher = dataclasses.replace(teacher, hidden=teacher.hidden.masked_fill(unseen[:, None], 0.0))
        lse_t = None if lse_t is None else lse_t.float().masked_fill(unseen, _BEYOND)
    grad = torch.is_grad_enabled()
    parts = (student.hidden, student.weight, student.bias)
    given = isinstance(student, GivenLogits)
    needs = tuple(grad and t is not None and t.requires_grad and not (given and n) for n, t in enumerate(parts))
    problem = Problem(
        student=student,
        target=target,
        factor=reduction.factor(counted, tokens, device, dtype),
        label_factor=None if label_weight is None else label_weight * reduction.factor(labelled, tokens, device, dtype),
        labels=labels,
        counted=either,
        teacher=teacher,
        indices=indices,
        logprobs=logprobs,
        beta=beta,
        lse_t=lse_t if student.shard is None else None,  # the gap of the two log-sum-exps needs the teacher's sums anyway
        needs=needs,
        statistics=statistics,
        max_counted=reduction.max_counted,
        plan=plan,
        workspace_bytes=workspace_bytes,
    )
    backend = choose_backend(problem, wide, device)
    if backend == "reference":
        loss, found = _plain(problem, reduction)
    elif reduction.kind == "none" or (inplace and needs[0]) or student.accumulate_into is not None:
        loss, found = _per_token(problem, reduction, backend, inplace)
    else:
        tensors, options = arguments(problem, backend)
        results = torch.ops.undo.vocab_loss(*tensors, **options)
        loss, found = results[0], _statistics(results)
    if statistics and unseen is not None:
        found = {name: value.masked_fill(unseen, 0.0) for name, value in found.items()}
    return loss, found


def choose_backend(problem: Problem, wide: bool, device: torch.device) -> str:
    """Returns the backend for a problem: plain PyTorch for float64, for ``plan="direct"`` and where the logits are few."""
    if wide or problem.plan == "direct":
        return "reference"
    backend = choose("vocab_loss", device)
    free = problem.plan == "auto" and problem.workspace_bytes is None
    return "reference" if free and prefers_direct(problem.tokens, problem.student.widest, backend) else backend


def prefers_direct(tokens: int, vocabulary: int, backend: str) -> bool:
    """Returns whether plain PyTorch is as fast as ``backend``, because the logits are few."""
    if backend not in _DIRECT:
        return False
    fewest_pairs, fewest_entries = _DIRECT[backend]
    return vocabulary < fewest_entries or tokens * vocabulary < fewest_pairs


def _per_token(
    problem: Problem, reduction: LossReduction, backend: str, inplace: bool
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    problem = dataclasses.replace(problem, plan="inplace") if inplace and problem.needs[0] else problem
    tensors, options = arguments(problem, backend)
    into = problem.student.accumulate_into
    run = torch.ops.undo.vocab_loss_tokens if into is None else functools.partial(vocab_loss_tokens_into, into)
    results = run(*tensors, **options)
    loss = torch.where(problem.factor == 0, 0.0, problem.factor * results[1])
    if problem.label_factor is not None:
        loss = loss + torch.where(problem.label_factor == 0, 0.0, problem.label_factor * results[2])
    return loss if reduction.kind == "none" else loss.sum(), _statistics(results)


def _statistics(results: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    names = ("lse_s", "lse_t", "teacher_entropy", "top1_agreement")
    return {name: value.detach() for name, value in zip(names, results[3:7], strict=True)}


def _plain(problem: Problem, reduction: LossReduction) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Computes the loss in plain PyTorch, differentiated by autograd.

    Tokens that do not count are removed. Where the host cannot count them, their hidden states are replaced by zeros instead.
    """
    counted = problem.counted
    if checks.looks(problem.student.hidden):
        p, taken = problem.taken()
    else:
        p, taken = problem.cleared(), slice(None)
    divergence, nll, statistics = token_losses(p)

    def weighted(values: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
        if counted is not None:  # a token may count for one of the two losses alone, and be infinite in the other
            values = values.masked_fill(factor == 0, 0.0)
        return values * factor

    loss = weighted(divergence, p.factor) if p.target != "own" else None
    if p.label_factor is not None:
        nll = weighted(nll, p.label_factor)
        loss = nll if loss is None else loss + nll

    def spread(values: torch.Tensor) -> torch.Tensor:
        if isinstance(taken, slice):
            return values if counted is None else torch.where(counted, values, 0.0)
        return values.new_zeros(problem.tokens).index_put((taken,), values)

    statistics = {name: spread(value) for name, value in statistics.items()}
    return spread(loss) if reduction.kind == "none" else loss.sum(), statistics


def _either(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return None if a is None or b is None else a | b
