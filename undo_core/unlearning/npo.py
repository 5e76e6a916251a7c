"""NPO: ``2/beta * mean(-log sigmoid(-beta * (log p - log p_original)(forget))) + retain_weight * CE(retain)``.

Zhang et al., "Negative Preference Optimization", 2024 (arXiv 2404.05868): gradient ascent whose weight fades on what the model has
become less sure of than the original was.
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
        beta: how fast the ascent fades; near 0 it is GradDiff. As published 0.1.
        unit: whose log-probabilities are compared: row (summed over a row's labels, as published, where a row is one answer) or token
            (each by itself, for packed rows, whose sums are so large that a row counts for all or nothing).
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
    """Memory: no second model. The original's log-probabilities of the forget labels are computed before the first step, 4 bytes each, and
    kept on the host with the batches that they are of: 13 bytes for each position of all steps' forget text. A resumed run computes
    them again."""
    beta, unit = config.npo.beta, config.npo.unit

    def forget(model: PreTrainedModel, batch: Batch, counted: int) -> torch.Tensor:
        gap = batch.reference - token_cross_entropy(model, batch)  # log p - log p_original, 0 where there is no label
        labels = batch.mask[:, 1:]
        if unit == "token":
            return 2 / beta * (F.softplus(beta * gap) * labels).sum() / max(counted, 1)
        return 2 / beta * (F.softplus(beta * gap.sum(-1)) * labels.any(-1)).sum() / labelled_rows(batch)

    return Method(forget_and_retain(forget, model, config), reference=token_cross_entropy)


def labelled_rows(batch: Batch) -> torch.Tensor:
    """Rows of the whole batch that have a label, at least 1; a 0-d tensor."""
    whole = batch if batch.whole is None else batch.whole
    return whole.mask[:, 1:].any(-1).sum().clamp_min(1)
