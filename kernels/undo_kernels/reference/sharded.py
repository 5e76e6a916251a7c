"""The vocabulary losses in plain PyTorch on a head whose entries are shared among processes.

The formulas are those of :mod:`undo_kernels.reference.divergence`, whose maxima and sums over the vocabulary go through
:class:`Exchange`. Divergence and negative log-likelihood are one autograd function, so that both use one exchange.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from undo_kernels.problem import DENSE, SPARSE, Problem
from undo_kernels.reference.divergence import Whole, dense, largest, sparse
from undo_kernels.vocabulary_shard import VocabularyShard


class Exchange(Whole):
    """Maxima and sums over the processes that share a head, for one call.

    The checksum of the hidden states, the label's logit and the sums of the statistics ride along in the first sum.

    Args:
        shard: the entries of this process.
        problem: the call, on the tokens that count.
        z_s: the student's logits ``[tokens, V of this process]``.
        z_t: the teacher's, for a dense target.
        labels: ``[tokens]``, counting over the whole vocabulary, or None.
    """

    def __init__(
        self, shard: VocabularyShard, problem: Problem, z_s: torch.Tensor, z_t: torch.Tensor | None, labels: torch.Tensor | None
    ) -> None:
        self.shard, self.problem, self.z_s, self.z_t, self.labels = shard, problem, z_s, z_t, labels
        self.m: tuple[torch.Tensor, ...] = ()
        self.l: tuple[torch.Tensor, ...] = ()
        self.label = self.entropy = self.agreement = None
        self.own = None if labels is None else shard.local(labels, z_s.shape[1])

    def max(self, *columns: torch.Tensor) -> tuple[torch.Tensor, ...]:
        whole = self.shard.max_(torch.stack([c.expand(len(self.z_s), 1) for c in columns]))
        self.m = tuple(whole)
        return self.m

    def sum(self, *columns: torch.Tensor) -> tuple[torch.Tensor, ...]:
        columns = tuple(c.expand(len(self.z_s), 1) for c in columns)
        if self.l:
            return tuple(self.shard.sum_(torch.stack(columns)))
        hidden = self.problem.student.hidden.detach()
        extra = list(self.shard.witness(hidden)[:, :, None])
        if self.own is not None:
            at = self.z_s.gather(1, self.own.clamp_min(0)[:, None]) if self.z_s.shape[1] else columns[0]
            extra.append(torch.where(self.own[:, None] >= 0, at, 0.0))
        statistics = self.problem.statistics and self.problem.target in DENSE
        if statistics:
            v = self.z_t - self.m[1]
            extra.append((v.exp() * v.clamp_min(-1e30)).sum(-1, keepdim=True))
            tops = [
                z.argmax(-1) if z.shape[1] else torch.zeros(len(z), dtype=torch.long, device=z.device)
                for z in (self.z_s, self.z_t)
            ]
            holds = torch.stack([largest(z)[:, 0] == m[:, 0] for z, m in zip((self.z_s, self.z_t), self.m, strict=True)])
            extra += self.shard.words(holds, tops[0] == tops[1]).to(self.z_s.dtype)[:, :, None].unbind()
        whole = self.shard.sum_(torch.stack([column.double() for column in (*columns, *extra)]))
        wrong = self.shard.differ(whole[len(columns) :][:3, :, 0])
        whole = whole.to(self.z_s.dtype)
        found, extra = whole[: len(columns)], list(whole[len(columns) + 3 :])
        self.l = (torch.where(wrong[:, None], math.nan, found[0]), *found[1:])
        if self.own is not None:
            self.label = extra.pop(0)[:, 0]
        if statistics:
            self.entropy = (self.l[1].log() - extra.pop(0) / self.l[1])[:, 0]
            self.agreement = 1.0 - self.shard.apart(torch.cat(extra, 1).T).to(self.z_s.dtype)
        return self.l

    def local(self, indices: torch.Tensor, size: int) -> torch.Tensor:
        return self.shard.local(indices, size)

    def entries(self, size: int) -> int:
        return self.shard.entries

    def lse(self, side: int) -> torch.Tensor:
        """Returns the log-sum-exps of the student (0) or teacher (1), ``[tokens]``; NaN for a token that contains +inf."""
        lse = (self.m[side] + self.l[side].log())[:, 0]
        return lse.masked_fill(lse == math.inf, math.nan)


class ShardedLosses(torch.autograd.Function):
    """Divergence, negative log-likelihood and statistics, ``[tokens]`` each, from ``(z_s, z_t, labels, indices, logprobs, problem)``.

    The logits are those of this process's entries; the results are those of the whole vocabulary, on every process. The gradient is
    that by this process's logits. It cannot be differentiated again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z_s: torch.Tensor,
        z_t: torch.Tensor | None,
        labels: torch.Tensor | None,
        indices: torch.Tensor | None,
        logprobs: torch.Tensor | None,
        problem: Problem,
    ) -> tuple[torch.Tensor, ...]:
        p, wanted = problem, ctx.needs_input_grad[0]
        over = Exchange(p.shard, p, z_s, z_t, labels)
        gradient, nll = None, z_s.new_zeros(len(z_s))
        if p.target in SPARSE:
            divergence, gradient = sparse(z_s, indices, logprobs, p.target, wanted, over)
        elif p.target == "own":
            divergence = nll
            (m,) = over.max(largest(z_s))
            over.sum((z_s - torch.where(m == -math.inf, 0.0, m)).exp().sum(-1, keepdim=True))
        else:
            divergence, gradient = dense(z_s, z_t, p.target, p.beta, wanted, over)
        if p.label_factor is not None:
            nll = over.lse(0)
            if labels is not None:
                nll = nll - torch.where(labels < 0, 0.0, torch.where(labels < p.shard.entries, over.label, math.nan))
        if wanted:
            ctx.save_for_backward(gradient, z_s, over.own, over.lse(0) if p.label_factor is not None else None)
        statistics = ()
        if p.statistics and p.target in DENSE:
            statistics = (over.lse(0), over.lse(1), over.entropy, over.agreement)
            ctx.mark_non_differentiable(*statistics)
        return divergence, nll, *statistics

    @staticmethod
    def backward(ctx: Any, grad_divergence: torch.Tensor, grad_nll: torch.Tensor, *_: Any) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "vocab_loss: second derivatives (create_graph=True) are not supported with a head that is sharded by vocabulary entries"
            )
        gradient, z_s, own, lse = ctx.saved_tensors
        total = 0.0 if gradient is None else grad_divergence[:, None] * gradient
        if lse is not None:
            p_s = (z_s - lse[:, None]).exp()
            if own is not None:
                p_s = torch.nn.functional.pad(p_s, (0, 1))
                column = torch.where(own >= 0, own, z_s.shape[1])[:, None]
                p_s = p_s.scatter_add(1, column, torch.full_like(column, -1, dtype=p_s.dtype))[:, :-1]
            total = total + grad_nll[:, None] * p_s
        return total, None, None, None, None, None
