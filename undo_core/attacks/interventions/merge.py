"""Merging back towards the original: every weight moves along the line between two models.

``theta_w = (1 - w) * theta + w * theta_original``. Linear interpolation of fine-tuned models is that of Wortsman et al. 2022
(model soups, arXiv 2203.05482); its use to undo a fine-tuning is that of Ilharco et al. 2023 (task arithmetic, arXiv 2212.04089).
At w = 0 the model is unchanged, at w = 1 it is the original; a forget performance that returns early says how near the
original is. The attacker needs the original, so that the worst case leaves it out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel

from undo_core.attacks.intervention import Given, Intervention, check_numbers, grid
from undo_core.models.pairs import paired


@dataclass(frozen=True)
class Merge(Intervention):
    """Moves all weights towards those of the original model.

    Attributes:
        kind: merge.
        weights: shares of the original, each from 0 to 1.
    """

    kind: Literal["merge"] = "merge"
    weights: list[float] = grid("weight", 0.1, 0.25, 0.5, 0.75)
    needs_original = True

    def __post_init__(self) -> None:
        check_numbers("weights", self.weights, 0, 1)

    @torch.no_grad()
    def apply(self, model: PreTrainedModel, given: Given) -> None:
        (weight,) = self.weights
        for own, original in paired(model, given.original()).values():
            own.lerp_(original.to(own), weight)
