"""The vocabulary losses in plain PyTorch: their definition, differentiable in any float dtype.

Every function takes rows that count (the face compacts masked ones away) and returns one value a row. What exceeds
``workspace_bytes`` runs in chunks of rows that are recomputed in the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

from undo_kernels.library import register
from undo_kernels.plan import rows_within
from undo_kernels.reference.divergence import divergence_rows, sparse_rows
from undo_kernels.reference.logits import Projection


@register("linear_kl_div", "reference")
def kl_rows(
    student: Projection,
    teacher: Projection,
    teacher_lse: torch.Tensor | None,
    labels: torch.Tensor | None,
    divergence: str,
    beta: float,
    workspace_bytes: int | None,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Divergence ``[rows]``, cross-entropy of ``labels`` ``[rows]`` (zeros without), and detached statistics ``[rows]`` each."""

    def chunk(student: Projection, teacher: Projection, *rest: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        lse_t, label = rest
        z_s = student.logits()
        with torch.no_grad():
            z_t = teacher.logits().to(z_s.dtype)
            lse_t = torch.logsumexp(z_t, -1) if lse_t is None else lse_t.to(z_t.dtype)
            log_t = z_t - lse_t[:, None]
            entropy = -(log_t.exp() * log_t.clamp_min(-1e30)).sum(-1)
            agreement = (z_s.argmax(-1) == z_t.argmax(-1)).to(z_s.dtype)
        lse_s = torch.logsumexp(z_s, -1)
        loss = divergence_rows(z_s, z_t, lse_s, lse_t, divergence, beta)
        nll = torch.zeros_like(loss) if label is None else lse_s - z_s.gather(-1, label.clamp_min(0)[:, None]).squeeze(-1)
        return loss, nll, lse_s.detach(), lse_t, entropy, agreement

    outputs = _in_chunks(chunk, (student, teacher), (teacher_lse, labels), student, 4, workspace_bytes)
    loss, nll, lse_s, lse_t, entropy, agreement = outputs
    stats = {"lse_s": lse_s, "lse_t": lse_t, "teacher_entropy": entropy, "top1_agreement": agreement}
    return loss, nll, {name: value.detach() for name, value in stats.items()}


@register("linear_lse", "reference")
def lse_rows(projection: Projection, workspace_bytes: int | None) -> torch.Tensor:
    """Log-sum-exp of the logits, ``[rows]``."""
    return _in_chunks(lambda p: (torch.logsumexp(p.logits(), -1),), (projection,), (), projection, 2, workspace_bytes)[0]


@register("linear_cross_entropy", "reference")
def cross_entropy_rows(projection: Projection, labels: torch.Tensor, workspace_bytes: int | None) -> torch.Tensor:
    """``lse - z[label]``, ``[rows]``."""

    def chunk(p: Projection, label: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.nn.functional.cross_entropy(p.logits(), label, reduction="none"),)

    return _in_chunks(chunk, (projection,), (labels,), projection, 2, workspace_bytes)[0]


@register("linear_uniform_kl", "reference")
def uniform_kl_rows(projection: Projection, workspace_bytes: int | None) -> torch.Tensor:
    """``KL(U || p) = lse - mean(z) - log V``, ``[rows]``; computed from ``z - mean(z)``, which does not cancel for large logits."""

    def chunk(p: Projection) -> tuple[torch.Tensor]:
        z = p.logits()
        z = z - z.mean(-1, keepdim=True)
        return (torch.logsumexp(z, -1) - math.log(p.vocabulary),)

    return _in_chunks(chunk, (projection,), (), projection, 3, workspace_bytes)[0]


@register("linear_sparse_kl_div", "reference")
def sparse_kl_rows(
    projection: Projection, indices: torch.Tensor, logprobs: torch.Tensor, tail: str, workspace_bytes: int | None
) -> torch.Tensor:
    """Forward KL against a teacher known at ``k`` entries, ``[rows]``."""

    def chunk(p: Projection, index: torch.Tensor, logprob: torch.Tensor) -> tuple[torch.Tensor]:
        return (sparse_rows(p.logits(), index, logprob, tail),)

    return _in_chunks(chunk, (projection,), (indices, logprobs), projection, 4, workspace_bytes)[0]


def _in_chunks(
    function: Callable[..., tuple[torch.Tensor, ...]],
    projections: tuple[Projection, ...],
    tensors: tuple[torch.Tensor | None, ...],
    first: Projection,
    copies: int,
    workspace_bytes: int | None,
) -> tuple[torch.Tensor, ...]:
    """``function`` on all rows, or on as many at a time as the workspace holds, recomputed in the backward."""
    rows = first.rows
    size = rows_within(workspace_bytes, rows, first.vocabulary, first.hidden.dtype, copies)
    if size >= rows:
        return function(*projections, *tensors)
    parts = []
    for start in range(0, rows, size):
        part = slice(start, start + size)
        cut = [None if t is None else t[part] for t in tensors]
        parts.append(checkpoint(function, *(p.take(part) for p in projections), *cut, use_reentrant=False))
    return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))
