"""SimNPO: ``2/beta * mean(-log sigmoid(beta * CE_row(forget) - gamma)) + retain_weight * CE(retain)``, ``CE_row`` a row's mean.

Fan et al., "Simplicity Prevails: Rethinking Negative Preference Optimization for LLM Unlearning", 2024 (arXiv 2410.07163): NPO
without a reference model, with log-probabilities divided by the length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from undo_core.training.batches import Batch
from undo_core.training.losses import token_cross_entropy
from undo_core.unlearning.method import Method, Settings, forget_and_retain, register
from undo_core.unlearning.npo import labelled_sequences


@dataclass(frozen=True)
class SimNPOConfig:
    """Settings of SimNPO alone.

    Attributes:
        beta: how fast the ascent decays as the sequence's cross-entropy grows; the authors' code has 0.1 for WMDP.
        gamma: margin; the ascent has half its weight where ``beta * CE`` equals gamma; 0 in the authors' TOFU setting.
    """

    beta: float = 0.1
    gamma: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.beta) and self.beta > 0):
            raise ValueError(f"beta: got {self.beta}, wanted a finite number > 0")
        if not (math.isfinite(self.gamma) and self.gamma >= 0):
            raise ValueError(f"gamma: got {self.gamma}, wanted a finite number >= 0")


@register("simnpo", "SimNPO", settings=SimNPOConfig)
def simnpo(model: PreTrainedModel, config: Settings) -> Method:
    """SimNPO. Memory: that of the cross-entropy."""
    beta, gamma = config.simnpo.beta, config.simnpo.gamma

    def forget(model: PreTrainedModel, batch: Batch, counted: int) -> torch.Tensor:
        labels = batch.mask[:, 1:]
        nats = token_cross_entropy(model, batch).sum(-1) / labels.sum(-1).clamp_min(1)
        return 2 / beta * (F.softplus(gamma - beta * nats) * labels.any(-1)).sum() / labelled_sequences(batch)

    return Method(forget_and_retain(forget, model, config))
