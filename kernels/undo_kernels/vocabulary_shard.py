"""A head that is split over processes by vocabulary entries: which part this process holds, and what the parts exchange.

Each process computes maxima and sums over its own entries. With ``u = z_s - m_s`` and ``v = z_t - m_t`` relative to its own maxima,

    l_s = sum e**u    l_t = sum e**v    difference = sum (e**u - e**v)    cross = sum e**u (u - v)    energy = sum e**v v

and :meth:`VocabularyShard.merged` brings all of them to the maxima of the whole vocabulary: ``a = e**(m_s - M_s)`` and
``b = e**(m_t - M_t)`` rescale the sums, and ``sum (a e**u - b e**v) = b difference + (a - b) l_s``, where ``a - b`` is taken from
``expm1`` of the shift between the two. So the gap of the two log-sum-exps, ``log1p(difference / l_t)``, stays exact when student
and teacher agree, however the vocabulary is cut.

Collectives per call, all over one process group, in float64 except the last; ``tokens`` are those that the backend works on::

    MAX  [sides, tokens]    maxima of the student and, where there is one, the teacher
    SUM  [k, tokens]        l_s; l_t and difference; cross (reverse); energy and a word for each rank (statistics); the label's logit;
                            logits at the known entries (sparse); a checksum of the hidden states, its square and their size
    SUM  [tokens]           the divergence of dense and uniform targets; [2, tokens] where jsd has a gradient
    SUM  [tokens, d]        gradient of the hidden states in float32, where it is needed

The ranks must pass the same hidden states. The checksum detects if they do not, which is what happens where a data-parallel shard
of the weight (FSDP) is taken for a vocabulary-parallel one. The ranks decide from its sums alone, so that all of them decide alike:
an error on some of them only would leave the others waiting.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

_groups: dict[str, dist.ProcessGroup] = {}  # by name: an op's arguments cannot hold the group itself
_ROOM = 1e-3  # of the sum of absolute values: by how much checksums of replicated hidden states may differ


@dataclass(frozen=True)
class VocabularyShard:
    """The vocabulary entries that this process holds.

    Attributes:
        group: name of the process group over which the vocabulary is split.
        first: index of the first entry held here.
        entries: number of entries of the whole vocabulary, padding excluded.
        widest: the largest number of entries that any process holds, so that all take the same decisions.
    """

    group: str
    first: int
    entries: int
    widest: int

    @classmethod
    def of(cls, group: dist.ProcessGroup, first: int, entries: int, widest: int) -> VocabularyShard:
        """Returns the shard of a process group, which later calls find by its name."""
        _groups[group.group_name] = group
        return cls(group.group_name, first, entries, widest)

    def local(self, indices: torch.Tensor, held: int) -> torch.Tensor:
        """Returns indices into the whole vocabulary as indices into the ``held`` entries of this process; -1 for others."""
        return torch.where((indices >= self.first) & (indices < self.first + held), indices - self.first, -1)

    def max_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replaces ``tensor``, which must be contiguous, by its maximum over the processes; returns it."""
        dist.all_reduce(tensor, dist.ReduceOp.MAX, _groups[self.group])
        return tensor

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replaces ``tensor``, which must be contiguous, by its sum over the processes; returns it."""
        dist.all_reduce(tensor, dist.ReduceOp.SUM, _groups[self.group])
        return tensor

    def witness(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns a checksum of each token's hidden states, its square, and the sum of their magnitudes, ``[3, tokens]`` float64."""
        checksum = hidden.sum(-1, dtype=torch.float64)
        return torch.stack([checksum, checksum.square(), torch.linalg.vector_norm(hidden, 1, dim=-1, dtype=torch.float64)])

    def differ(self, summed: torch.Tensor) -> torch.Tensor:
        """Returns ``[tokens]`` bool, where the processes passed different hidden states, from the sum of their :meth:`witness`.

        Raises:
            ValueError: some did, and the host can see it (on a CPU). Elsewhere the caller makes the loss NaN.
        """
        ranks = dist.get_world_size(_groups[self.group])
        checksum, square, size = summed
        wrong = square - checksum.square() / ranks > (size / ranks * _ROOM).square()  # the squared distances from the mean
        if wrong.device.type == "cpu" and wrong.any():
            raise ValueError(
                "hidden: got different hidden states on the processes that share a head, wanted the same on all of them: each "
                "computes its part of the vocabulary for the same tokens. If the weight is sharded by FSDP, unshard it first "
                "(compute the loss inside the unit's forward)"
            )
        return wrong

    def merged(self, sums: dict[str, torch.Tensor], witness: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the sums over the whole vocabulary, from those over this process's entries; see the module.

        Args:
            sums: ``[tokens]`` each: ``m_s`` and ``l_s``; with a teacher ``m_t``, ``l_t`` and ``difference``; with statistics
                ``energy``, ``top_s`` and ``top_t``; optionally ``cross``, ``label`` (NaN where another process holds it) and
                ``picked`` ``[tokens, k]`` (0 where another process holds it).
            witness: :meth:`witness` of the student's hidden states of these tokens.

        Returns:
            The same names. ``top_s`` and ``top_t`` are equal where the two most likely entries are the same, and differ elsewhere.
        """
        here = torch.stack([sums[name].double() for name in ("m_s", "m_t") if name in sums])
        most = self.max_(here.clone())
        columns = rescaled(sums, most)
        if "label" in sums:
            columns["label"] = sums["label"].double().nan_to_num(0.0, math.inf, -math.inf)
        rows = [witness, *(column[None] for column in columns.values())]
        if "picked" in sums:
            rows.append(sums["picked"].double().T)
        if "top_s" in sums:
            rows.append(self.words(here == most, sums["top_s"] == sums["top_t"]))
        summed = self.sum_(torch.cat(rows))
        wrong, summed = self.differ(summed[: len(witness)]), summed[len(witness) :]
        found = dict(zip(columns, summed, strict=False)) | {"m_s": most[0]}
        found["l_s"] = torch.where(wrong, math.nan, found["l_s"])
        if "m_t" in sums:
            found["m_t"] = most[1]
        if "picked" in sums:
            found["picked"] = summed[len(columns) :][: sums["picked"].shape[1]].T
        if "top_s" in sums:
            found |= {
                "top_s": torch.zeros_like(most[0]),
                "top_t": self.apart(summed[-dist.get_world_size(_groups[self.group]) :]),
            }
        return found

    def words(self, holds: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
        """Returns ``[ranks, tokens]``, 0 except for this rank: 1 if it holds the student's most likely entry, plus 2 if it holds the
        teacher's, plus 4 if its own most likely entries are the same."""
        group = _groups[self.group]
        words = torch.zeros(dist.get_world_size(group), same.shape[0], dtype=torch.float64, device=same.device)
        words[dist.get_rank(group)] = holds[0] + 2.0 * holds[1] + 4.0 * same
        return words

    def apart(self, words: torch.Tensor) -> torch.Tensor:
        """Returns ``[tokens]``, 0 where the most likely entries of student and teacher are the same, else 1."""
        words = words.long()
        holder_s, holder_t = (words & 1).argmax(0), (words >> 1 & 1).argmax(0)  # the first, as in a tie on one device
        same = words.gather(0, holder_s[None])[0] >> 2 & 1
        return ((holder_s != holder_t) | (same == 0)).double()


def rescaled(sums: dict[str, torch.Tensor], most: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns ``l_s`` and, where they are given, ``l_t``, ``difference``, ``cross`` and ``energy`` relative to other maxima, in float64.

    ``most`` holds the maxima of the student and, if there are sums of it, of the teacher, ``[sides, ...]``; each is at least that of the
    sums. Added over the parts of a vocabulary, the results are the sums of the whole. See the module for the formulas.
    """
    sums = {name: values.double() for name, values in sums.items()}
    down = [sums[name] - m for name, m in zip(("m_s", "m_t"), most, strict=False)]
    # Two infinite maxima differ by NaN; -inf is that of an empty sum.
    a, *others = (
        torch.where(sums[name] == m, 1.0, torch.where(sums[name] == -math.inf, 0.0, fall.exp()))
        for name, m, fall in zip(("m_s", "m_t"), most, down, strict=False)
    )
    l_s = sums["l_s"]
    found = {"l_s": a * l_s}
    if others:
        b, l_t = others[0], sums["l_t"]
        shift = down[0] - down[1]
        ahead = torch.where((b == 0) | ~shift.isfinite(), a - b, b * shift.expm1())  # a - b without cancellation
        found |= {"l_t": b * l_t, "difference": b * sums["difference"] + ahead * l_s}
        if "cross" in sums:
            found["cross"] = torch.where((l_s > 0) & (a > 0), a * (sums["cross"] + shift * l_s), 0.0)
        if "energy" in sums:
            fall = torch.where(b == 0, 0.0, down[1] * l_t)
            found["energy"] = torch.where(l_t > 0, b * (sums["energy"] + fall), 0.0)
    return found


def bytes_exchanged(
    target: str,
    tokens: int,
    width: int,
    ranks: int,
    *,
    labels: bool = False,
    known: int = 0,
    statistics: bool = False,
    gradient: bool = True,
) -> dict[str, int]:
    """Returns the bytes of each all-reduce of one call of a fused backend, in order; a ring sends 2 (ranks - 1) / ranks times as many.

    Args:
        target: see :mod:`undo_kernels.problem`.
        tokens: tokens that the backend works on: on CPUs the counted ones.
        width: width of the student's hidden states.
        ranks: number of processes that share the head.
        labels: whether there are labels.
        known: known entries of a sparse teacher for each token.
        statistics: whether teacher entropy and top-1 agreement are wanted.
        gradient: whether the gradient of the hidden states is.
    """
    dense = target in ("forward", "reverse", "jsd")
    sums = 4 + 2 * dense + (target == "reverse") + labels + known + (1 + ranks) * statistics  # three of the checksum, and l_s
    losses = (2 if target == "jsd" and gradient else 1) if dense or target == "uniform" else 0
    columns = {"maxima": 8 * (1 + dense), "sums": 8 * sums, "losses": 8 * losses, "hidden gradient": 4 * width * gradient}
    return {name: size * tokens for name, size in columns.items() if size}


class SummedGradient(torch.autograd.Function):
    """Identity whose backward sums the gradient over the processes that share a head; all of them get the whole gradient."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, shard: VocabularyShard) -> torch.Tensor:
        ctx.shard = shard
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.shard.sum_(grad.clone(memory_format=torch.contiguous_format)), None
