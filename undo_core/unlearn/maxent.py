"""MaxEnt: predict uniformly on the forget text. ``KL(U || p)(forget) + retain_weight * CE(retain)``."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from undo_core.training.batches import Batch
from undo_core.training.losses import cross_entropy, uniform_kl
from undo_core.unlearn.config import UnlearnConfig
from undo_core.unlearn.method import Method


def maxent(model: PreTrainedModel, config: UnlearnConfig) -> Method:
    """The published language and arithmetic setting (arXiv 2506.06278, code); every parameter is trained."""

    def loss(model: PreTrainedModel, batches: dict[str, Batch], counted: dict[str, int]) -> torch.Tensor:
        terms = []
        if "forget" in batches:
            terms.append(uniform_kl(model, batches["forget"], counted["forget"]))
        if "retain" in batches:
            terms.append(config.retain_weight * cross_entropy(model, batches["retain"], counted["retain"]))
        return sum(terms)

    return Method(loss)
