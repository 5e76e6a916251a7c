"""Stands for the ranks that share a head while a stage is planned on the meta device, and counts what they would exchange."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from undo_kernels.problem import Problem
from undo_kernels.vocabulary_shard import bytes_exchanged

from undo_core.distributed.vocabulary import Sharing, check_shareable, look_up_in_parts

Exchanges = collections.Counter
"""Calls of a step by ``(kind, what, payload)``, as in :class:`undo_core.planning.communication.Collective`."""


class PlannedSharing(Sharing):
    """The first of ``ranks`` ranks, which holds the largest part of the vocabulary; all of them have as many tokens.

    Attributes:
        exchanges: what the ranks exchange in a step.
    """

    def __init__(self, ranks: int) -> None:
        self.ranks, self.rank = ranks, 0
        self.exchanges: Exchanges[tuple[str, str, int]] = collections.Counter()
        self._factor = 0.0

    def __deepcopy__(self, memo: dict[int, Any]) -> PlannedSharing:
        return self  # a copy of a model shares its head with the same ranks

    @contextlib.contextmanager
    def counting(self, micro_batches: float) -> Iterator[None]:
        """Counts what is exchanged inside the block as that of a step; ``micro_batches`` is by how many more a step has."""
        self._factor = micro_batches
        try:
            yield
        finally:
            self._factor = 0.0

    def divided(self, model: PreTrainedModel) -> PreTrainedModel:
        """Leaves of the model's head, and of an embedding tied to it, the part that one rank holds; returns the model."""
        if self.ranks == 1:
            return model
        output, embedding = check_shareable(model)  # measures the head while it is whole
        rows = -(-len(output.weight) // self.ranks)
        for name, parameter in list(output.named_parameters(recurse=False)):
            setattr(output, name, nn.Parameter(parameter.data.new_empty(rows, *parameter.shape[1:]), parameter.requires_grad))
        model._undo_sharing = self
        if embedding is not None:
            embedding.weight = output.weight
            look_up_in_parts(embedding, self)
        return model

    def called(self, problem: Problem) -> None:
        """Counts what a call of a fused loss exchanges; where logits are so few that plain PyTorch computes them, there is no such call."""
        if self.ranks > 1:
            known = 0 if problem.indices is None else problem.indices.shape[1]
            given = {"labels": problem.labels is not None, "known": known, "gradient": problem.needs[0]}
            tokens, width = problem.student.hidden.shape
            parts = bytes_exchanged(problem.target, tokens, width, self.ranks, statistics=problem.statistics, **given)
            if problem.lse_s is not None and problem.teacher is None and problem.indices is None:
                parts = {what: parts[what] for what in parts if what == "hidden gradient"}  # the forward pass had all sums
            for what, payload in parts.items():
                self._count("all_reduce", f"head: {what}", payload)

    def largest(self, own: int) -> int:
        return own

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        found = own.new_empty(self.ranks * len(own), *own.shape[1:])
        self._count("all_gather", "head: tokens", found.nbytes)
        return found

    def scatter_sum(self, parts: torch.Tensor) -> torch.Tensor:
        self._count("reduce_scatter", "head: embeddings", parts.nbytes)
        return parts.new_empty(len(parts) // self.ranks, *parts.shape[1:])

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        self._count("all_reduce", "head: logits", tensor.nbytes)
        return tensor

    def _count(self, kind: str, what: str, payload: int) -> None:
        self.exchanges[kind, what, payload] += self._factor
