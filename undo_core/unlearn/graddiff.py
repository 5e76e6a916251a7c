"""GradDiff: ascend on the forget text. ``-CE(forget) + retain_weight * CE(retain)``."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from undo_core.training.batches import Batch
from undo_core.training.losses import cross_entropy
from undo_core.unlearn.config import UnlearnConfig
from undo_core.unlearn.method import Method


def graddiff(model: PreTrainedModel, config: UnlearnConfig) -> Method:
    """The published language (weight 1) and arithmetic (weight 15) setting; every parameter is trained."""

    def loss(model: PreTrainedModel, batches: dict[str, Batch], counted: dict[str, int]) -> torch.Tensor:
        terms = []
        if "forget" in batches:
            terms.append(-cross_entropy(model, batches["forget"], counted["forget"]))
        if "retain" in batches:
            terms.append(config.retain_weight * cross_entropy(model, batches["retain"], counted["retain"]))
        return sum(terms)

    return Method(loss)
