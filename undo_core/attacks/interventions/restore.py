"""Steering back towards the original by the difference of mean activations between the two models.

``h <- h + s * v`` with ``v = [mean(h | forget) - mean(h | retain)]_original - [mean(h | forget) - mean(h | retain)]_model`` of one
layer's outputs: the shift on forget text that the unlearning made, without what it did to all text. A difference of means as a
steering vector: Rimsky et al. 2023 (arXiv 2312.06681). If a single vector brings the capability back, the suppression is one
direction. At ``s = 0`` nothing changes. It needs the original, so that the worst case leaves it out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel

from undo_core.attacks.intervention import Effort, Given, Intervention, change_layer, check_counts, check_numbers, grid
from undo_core.attacks.interventions.steer import BATCH, contrast
from undo_core.models.layers import layer_at


@dataclass(frozen=True)
class Restore(Intervention):
    """Adds the mean difference to the original's activations to a layer's outputs.

    Attributes:
        kind: restore.
        depths: where, each a share of the layers above 0 and up to 1: 1 is after the last layer.
        strengths: factors ``s``.
        sequences: number of sequences of forget and of retain text for the means.
    """

    kind: Literal["restore"] = "restore"
    depths: list[float] = grid("depth", 0.25, 0.5, 0.75)
    strengths: list[float] = grid("strength", 0.5, 1.0, 2.0)
    sequences: int = 64
    needs_original = True

    def __post_init__(self) -> None:
        check_numbers("depths", self.depths, 0, 1, above=True)
        check_numbers("strengths", self.strengths, -math.inf, math.inf)
        check_counts(sequences=self.sequences)

    def apply(self, model: PreTrainedModel, given: Given) -> None:
        (depth,), (strength,) = self.depths, self.strengths
        index = layer_at(model, depth)
        own, original = (contrast(each, given, index, self.sequences) for each in (model, given.original()))
        shift = strength * (original - own)
        change_layer(model, given, index, lambda hidden: hidden + shift.to(hidden))

    def effort(self) -> Effort:
        return Effort(4 * math.ceil(self.sequences / BATCH), BATCH, 1)
