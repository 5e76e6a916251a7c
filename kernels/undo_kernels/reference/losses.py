"""The vocabulary losses in plain PyTorch: their definition, differentiable in any float dtype.

Every row counts (the face takes masked ones away) and gets one value of each kind. What exceeds ``workspace_bytes`` runs in
chunks of rows that are recomputed in the backward pass.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch.utils.checkpoint import checkpoint

from undo_kernels.library import register
from undo_kernels.problem import DENSE, SPARSE, Problem, Result, gradient_dtype
from undo_kernels.reference.divergence import divergence_rows, sparse_rows
from undo_kernels.projection import Projection

COPIES = {
    "own": 2,
    "uniform": 3,
    "forward": 4,
    "reverse": 4,
    "jsd": 4,
    "bucket": 4,
    "renormalize": 4,
}  # [rows, V] arrays at once


def row_losses(problem: Problem) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Divergence and nll, ``[rows]`` each, and detached statistics: ``lse_s``, ``lse_t``, entropy and agreement where wanted."""
    p = problem
    tensors = (p.labels, p.indices, p.logprobs, p.lse_t)
    size = rows_within(p.workspace_bytes, p.rows, p.student.vocabulary, p.student.hidden.dtype, COPIES[p.target])
    if size >= p.rows:
        outputs = _chunk(p, p.student, p.teacher, *tensors)
    else:
        parts = []
        for start in range(0, p.rows, size):
            part = slice(start, start + size)
            sides = [None if side is None else side.take(part) for side in (p.student, p.teacher)]
            cut = [None if t is None else t[part] for t in tensors]
            parts.append(checkpoint(_chunk, p, *sides, *cut, use_reentrant=False))
        outputs = tuple(torch.cat(columns) for columns in zip(*parts, strict=True))
    divergence, nll, *statistics = outputs
    names = ("lse_s", "lse_t", "teacher_entropy", "top1_agreement")
    return divergence, nll, {name: value.detach() for name, value in zip(names, statistics, strict=False)}


@register("vocab_loss", "reference")
def vocab_loss(problem: Problem) -> Result:
    """The op of ``undo_kernels.torch_ops`` by autograd; its results are in float32, as every backend's are."""
    p, rows = problem.taken()
    parts = [p.student.hidden, p.student.weight, p.student.bias]
    leaves = [None if t is None else t.detach().requires_grad_(need) for t, need in zip(parts, p.needs, strict=True)]
    p = replace(p, student=replace(p.student, hidden=leaves[0], weight=leaves[1], bias=leaves[2]))
    with torch.enable_grad():
        divergence, nll, statistics = row_losses(p)
        total = (p.factor * divergence).sum()
        total = total if p.label_factor is None else total + (p.label_factor * nll).sum()
    wanted = [leaf for leaf, need in zip(leaves, p.needs, strict=True) if need]
    found = iter(torch.autograd.grad(total, wanted) if wanted and p.rows else [torch.zeros_like(t) for t in wanted])
    none = total.new_zeros(0, dtype=torch.float32)
    gradients = [
        next(found).to(gradient_dtype(leaf.dtype)) if need else none for leaf, need in zip(leaves, p.needs, strict=True)
    ]

    def spread(values: torch.Tensor | None) -> torch.Tensor:
        if values is None:
            return none
        values = values.detach()
        return values.new_zeros(problem.rows, *values.shape[1:]).index_put((rows,), values) if torch.is_tensor(rows) else values

    d_hidden = spread(gradients[0]) if p.needs[0] else none
    if problem.inplace and p.needs[0]:
        d_hidden = problem.student.hidden.copy_(d_hidden)
    names = ("lse_s", "lse_t", "teacher_entropy", "top1_agreement")
    return Result(
        total.detach().float(),
        spread(divergence).float(),
        none if p.label_factor is None else spread(nll).float(),
        *(none if statistics.get(name) is None else spread(statistics[name]).float() for name in names),
        total.new_zeros(2, dtype=torch.float32),
        d_hidden,
        *gradients[1:],
    )


def _chunk(
    p: Problem,
    student: Projection,
    teacher: Projection | None,
    labels: torch.Tensor | None,
    indices: torch.Tensor | None,
    logprobs: torch.Tensor | None,
    lse_t: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    z = student.logits()
    lse = torch.logsumexp(z, -1)
    nll = lse
    if p.label_factor is not None and labels is not None:
        nll = torch.nn.functional.cross_entropy(z, labels.masked_fill(labels < 0, -100), reduction="none")
    divergence = torch.zeros_like(lse)
    if p.target == "uniform":  # from z - mean(z), which does not cancel for large logits
        centred = z - z.mean(-1, keepdim=True)
        divergence = torch.logsumexp(centred, -1) - math.log(student.vocabulary)
    elif p.target in SPARSE:
        divergence = sparse_rows(z, indices, logprobs, p.target)
    elif p.target in DENSE:
        with torch.no_grad():
            z_t = teacher.logits().to(z.dtype)
            lse_t = torch.logsumexp(z_t, -1) if lse_t is None else lse_t.to(z_t.dtype)
        divergence = divergence_rows(z, z_t, lse, lse_t, p.target, p.beta)
        if p.statistics:
            log_t = z_t - lse_t[:, None]
            entropy = -(log_t.exp() * log_t.clamp_min(-1e30)).sum(-1)
            return divergence, nll, lse.detach(), lse_t, entropy, (z.argmax(-1) == z_t.argmax(-1)).to(z.dtype)
    return divergence, nll, lse.detach()


def rows_within(workspace_bytes: int | None, rows: int, vocabulary: int, dtype: torch.dtype, copies: int) -> int:
    """Rows whose ``copies`` arrays of logits fit the workspace; at least one, all of them without a bound."""
    if workspace_bytes is None:
        return rows
    itemsize = 8 if dtype == torch.float64 else 4
    return max(1, min(rows, workspace_bytes // (vocabulary * itemsize * copies)))
