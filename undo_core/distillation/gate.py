"""Gate of filter-then-distill: a cheap classifier, fitted on a few labelled sequences, that drops sequences that look like
forget text.

The features of a sequence are hashed counts of its tokens and of its pairs of neighbouring tokens: ``log(1 + count)``, scaled
to norm 1. A logistic regression with an L2 penalty is fitted on them by LBFGS in float64; no language model runs. A sequence is
dropped if the classifier finds forget more likely than retain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F

from undo_core.data.sequences import Sequences

SEQUENCES_AT_ONCE = 1024
_MULTIPLIERS = (0x9E3779B1, 0x85EBCA77)  # odd constants of the hash


@dataclass(frozen=True)
class GateConfig:
    """Settings of filter-then-distill: the original model teaches on the sequences that a classifier keeps, without unlearning.

    Attributes:
        share: share of the retain and of the forget training sequences that are labelled, in (0, 1]; 0 leaves this control
            out.
        alphas: noise strengths; each student is a copy of the original with the run's noise at this strength. Empty for one
            student with random weights.
        buckets: number of buckets of the hashed counts, which is the number of weights of the classifier.
        penalty: factor of the L2 penalty that is added to the mean loss.
        seed: seed of the choice of labelled sequences; None derives it from the run's seed.
    """

    share: float = 0.0
    alphas: list[float] = field(default_factory=list)
    buckets: int = 4096
    penalty: float = 1e-4
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"gate.share: got {self.share}, wanted a number in [0, 1]")
        if any(not 0 <= alpha <= 1 for alpha in self.alphas) or len(set(self.alphas)) < len(self.alphas):
            raise ValueError(f"gate.alphas: got {self.alphas}, wanted different numbers in [0, 1]")
        if self.buckets < 2:
            raise ValueError(f"gate.buckets: got {self.buckets}, wanted an integer >= 2")
        if not (math.isfinite(self.penalty) and self.penalty > 0):
            raise ValueError(f"gate.penalty: got {self.penalty}, wanted a finite number > 0")


@dataclass(frozen=True)
class Classifier:
    """Fitted classifier: ``weight`` ``[buckets]`` and ``bias``, float64; a positive score means forget."""

    weight: torch.Tensor
    bias: torch.Tensor

    def forget(self, sequences: Sequences) -> torch.Tensor:
        """Returns ``[n]`` bool, True for each sequence that is classified as forget."""
        parts = zip(sequences.input_ids.split(SEQUENCES_AT_ONCE), sequences.text_mask().split(SEQUENCES_AT_ONCE), strict=True)
        return torch.cat([features(*part, len(self.weight)) @ self.weight + self.bias > 0 for part in parts])

    def quality(self, forget: Sequences, retain: Sequences) -> dict[str, Any]:
        """Precision and recall for the forget sequences, and the numbers of sequences; precision is None if none is dropped."""
        hits, alarms = int(self.forget(forget).sum()), int(self.forget(retain).sum())
        return {
            "precision": hits / (hits + alarms) if hits + alarms else None,
            "recall": hits / len(forget),
            "forget_rows": len(forget),
            "retain_rows": len(retain),
        }


def fit_classifier(forget: Sequences, retain: Sequences, config: GateConfig | None = None) -> Classifier:
    """Fits the classifier on labelled sequences; deterministic, and a function of the sequences and ``config`` alone.

    Memory: ``8 * buckets`` bytes per sequence.
    """
    config = config or GateConfig()
    parts = (forget, retain)
    x = torch.cat([features(sequences.input_ids, sequences.text_mask(), config.buckets) for sequences in parts])
    y = torch.cat([torch.full((len(sequences),), float(sequences is forget), dtype=torch.float64) for sequences in parts])
    weight = torch.zeros(config.buckets, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    fit = torch.optim.LBFGS([weight, bias], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        fit.zero_grad()
        value = F.binary_cross_entropy_with_logits(x @ weight + bias, y) + config.penalty * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        fit.step(loss)
    return Classifier(weight.detach(), bias.detach())


def labelled(sequences: Sequences, share: float, seed: int) -> Sequences:
    """Draws the labelled sequences, without replacement; at least one sequence."""
    index = sequences.order(0, max(1, round(share * len(sequences))), seed)
    return sequences.take(index)


def features(input_ids: torch.Tensor, text: torch.Tensor, buckets: int) -> torch.Tensor:
    """Features ``[n, buckets]`` float64 of token sequences ``[n, length]``; ``text`` is False for tokens to ignore."""
    ids = input_ids.long()
    tokens, pairs = _hash(ids, buckets), _hash(ids[:, 1:], buckets, ids[:, :-1])
    counts = torch.zeros(len(ids), buckets, dtype=torch.float64)
    counts.scatter_add_(1, tokens, text.double())
    counts.scatter_add_(1, pairs, (text[:, 1:] & text[:, :-1]).double())
    counts.log1p_()
    return counts.div_(counts.norm(dim=1, keepdim=True).clamp_min(1e-12))


def _hash(ids: torch.Tensor, buckets: int, before: torch.Tensor | None = None) -> torch.Tensor:
    """Bucket of each token, or of each pair of a token and the one before it."""
    mixed = (ids + 1) * _MULTIPLIERS[0]
    if before is not None:
        mixed = mixed + (before + 1) * _MULTIPLIERS[1] * _MULTIPLIERS[0]
    mixed = mixed & 0xFFFFFFFF
    mixed = (mixed ^ mixed >> 15) * _MULTIPLIERS[1] & 0xFFFFFFFF
    return (mixed ^ mixed >> 13) % buckets
