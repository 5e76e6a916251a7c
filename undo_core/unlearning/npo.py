"""NPO: ``2/beta * mean(-log sigmoid(-beta * (log p - log p_original)(forget))) + retain_weight * CE(retain)``.

Zhang et al., "Negative Preference Optimization", 2024 (arXiv 2404.05868): gradient ascent whose weight decays as the model's
probability of the text falls below the original model's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from undo_core.models import forward_flops
from undo_core.training.batches import Batch
from undo_core.training.losses import token_cross_entropy
from undo_core.unlearning.method import Method, Settings, forget_and_retain, register


@dataclass(frozen=True)
class NPOConfig:
    """Settings of NPO alone.

    Attributes:
        beta: how fast the ascent decays; near 0 the method is GradDiff. The published value is 0.1.
        unit: unit whose log-probabilities are compared: row (summed over the labels of a sequence, as published, where a
            sequence is one answer) or token (each label by itself, for packed sequences, whose sums are so large that the
            weight of a sequence would be all or nothing).
    """

    beta: float = 0.1
    unit: Literal["row", "token"] = "row"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.beta) and self.beta > 0):
            raise ValueError(f"beta: got {self.beta}, wanted a finite number > 0")
        if self.unit not in ("row", "token"):
            raise ValueError(f"unit: got {self.unit!r}, wanted row or token")


def _reference_flops(model: PreTrainedModel, config: Settings, length: int) -> dict[str, float]:
    return {"forget": forward_flops(model, length), "retain": 0.0}


@register("npo", "NPO", settings=NPOConfig, reference_flops=_reference_flops)
def npo(model: PreTrainedModel, config: Settings) -> Method:
    """NPO. The original model's log-probabilities of the forget labels are computed before the first step.

    Memory: no second model. The log-probabilities, 4 bytes per label, are kept on the host together with their batches: 13
    bytes per position of the forget text of all steps. A resumed run computes them again.
    """
    beta, unit = config.npo.beta, config.npo.unit

    def forget(model: PreTrainedModel, batch: Batch, counted: int) -> torch.Tensor:
        gap = batch.reference - token_cross_entropy(model, batch)  # log p - log p_original, 0 where there is no label
        labels = batch.mask[:, 1:]
        if unit == "token":
            return 2 / beta * (F.softplus(beta * gap) * labels).sum() / max(counted, 1)
        return 2 / beta * (F.softplus(beta * gap.sum(-1)) * labels.any(-1)).sum() / labelled_sequences(batch)

    return Method(forget_and_retain(forget, model, config), reference=token_cross_entropy)


def labelled_sequences(batch: Batch) -> torch.Tensor:
    """Number of sequences of the whole batch that have a label, at least 1; a 0-d tensor."""
    whole = batch if batch.whole is None else batch.whole
    return whole.mask[:, 1:].any(-1).sum().clamp_min(1)
