"""The vocabulary losses in plain PyTorch: their definition, differentiable in any float dtype.

The caller removes masked tokens, so every token counts. If the logits exceed ``workspace_bytes``, the tokens run in chunks that the
backward pass recomputes.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.utils.checkpoint import checkpoint

from undo_kernels.problem import DENSE, Problem
from undo_kernels.projection import Projection
from undo_kernels.record import Call, record_autograd, recording
from undo_kernels.reference.divergence import LogSumExp, TokenDivergence
from undo_kernels.reference.plan import CHUNKED, COPIES, tokens_within
from undo_kernels.reference.sharded import ShardedLosses


def token_losses(problem: Problem) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Returns divergence and nll, ``[tokens]`` each, and, with ``statistics``, detached lse_s, lse_t, entropy and agreement."""
    p = problem
    tensors = (p.labels, p.indices, p.logprobs, p.unseen)
    size = tokens_within(p.workspace_bytes, p.tokens, p.student.widest, p.student.hidden.dtype, COPIES[p.target])
    if size >= p.tokens:
        outputs = _chunk(p, p.student, p.teacher, *tensors)
    else:
        parts = []
        for start in range(0, p.tokens, size):
            part = slice(start, start + size)
            sides = [None if side is None else side.take(part) for side in (p.student, p.teacher)]
            cut = [None if t is None else t[part] for t in tensors]
            parts.append(checkpoint(_chunk, p, *sides, *cut, use_reentrant=False))
        outputs = tuple(torch.cat(columns) for columns in zip(*parts, strict=True))
    divergence, nll, *statistics = outputs
    if recording():
        plan = "direct" if size >= p.tokens else CHUNKED
        record_autograd(Call("vocab_loss", "reference", plan, "", p.tokens, p.student.vocabulary), [divergence, nll])
    names = ("lse_s", "lse_t", "teacher_entropy", "top1_agreement")
    return divergence, nll, {name: value.detach() for name, value in zip(names, statistics, strict=False)}


def _chunk(
    p: Problem,
    student: Projection,
    teacher: Projection | None,
    labels: torch.Tensor | None,
    indices: torch.Tensor | None,
    logprobs: torch.Tensor | None,
    unseen: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    z = student.logits()
    if p.shard is not None:
        with torch.no_grad():
            z_t = (
                z.new_zeros(1, z.shape[1])
                if p.target == "uniform"
                else None
                if teacher is None
                else teacher.logits().to(z.dtype)
            )
        return ShardedLosses.apply(z, z_t, labels, indices, logprobs, replace(p, student=student))
    nll = divergence = z.new_zeros(z.shape[0])
    if p.label_factor is not None and labels is None:
        nll = LogSumExp.apply(z)
    elif p.label_factor is not None:
        nll = torch.nn.functional.cross_entropy(z, labels.masked_fill(labels < 0, -100), reduction="none")
    z_t = None
    if p.target == "uniform":
        z_t = z.new_zeros(1, z.shape[1])
    elif p.target in DENSE:
        with torch.no_grad():
            z_t = teacher.logits().to(z.dtype)
        if unseen is not None:
            z_t = z_t.masked_fill(unseen[:, None], 0.0)
    if p.target != "own":
        divergence = TokenDivergence.apply(z, z_t, indices, logprobs, p.target, p.beta)
    if not p.statistics or p.target not in DENSE:
        return divergence, nll
    log_t = z_t.log_softmax(-1)
    entropy = -(log_t.exp() * log_t.clamp_min(-1e30)).sum(-1)
    agreement = (z.argmax(-1) == z_t.argmax(-1)).to(z.dtype)
    return divergence, nll, LogSumExp.apply(z), LogSumExp.apply(z_t), entropy, agreement
