"""Steering along the direction that separates forget from retain text inside the attacked model.

With ``r = mean(h | forget) - mean(h | retain)`` of a layer's outputs and ``u = r / |r|``:
``add``: ``h <- h + s * r`` (activation addition, Turner et al. 2023, arXiv 2308.10248);
``remove``: ``h <- h - s * (h . u) u``, which at ``s = 1`` removes the direction, as that of refusal is removed by Arditi et al.
2024 (arXiv 2406.11717): a model that suppresses by writing "this is forget text" along one direction stops doing so. Removing
such directions from unlearned models: Lucki et al. 2024 (arXiv 2409.18025). At ``s = 0`` nothing changes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel

from undo_core.attacks.intervention import (
    Effort,
    Given,
    Intervention,
    change_layer,
    check_counts,
    check_names,
    check_numbers,
    grid,
)
from undo_core.data.sequences import Sequences
from undo_core.evaluation.activations import mean_outputs
from undo_core.models.layers import layer_at

WAYS = ("remove", "add")
BATCH = 8  # sequences that the plan takes for a batch


@dataclass(frozen=True)
class Steer(Intervention):
    """Adds the difference of mean activations on forget and retain text to a layer's outputs, or removes its direction.

    Attributes:
        kind: steer.
        depths: where, each a share of the layers above 0 and up to 1: 1 is after the last layer.
        ways: remove, add.
        strengths: factors ``s``; negative ones add the opposite.
        sequences: number of sequences of forget and of retain text for the means.
    """

    kind: Literal["steer"] = "steer"
    depths: list[float] = grid("depth", 0.25, 0.5, 0.75)
    ways: list[str] = grid("way", *WAYS)
    strengths: list[float] = grid("strength", -1.0, 1.0, 2.0)
    sequences: int = 64

    def __post_init__(self) -> None:
        check_numbers("depths", self.depths, 0, 1, above=True)
        check_names("ways", self.ways, WAYS)
        check_numbers("strengths", self.strengths, -math.inf, math.inf)
        check_counts(sequences=self.sequences)

    def apply(self, model: PreTrainedModel, given: Given) -> None:
        (depth,), (way,), (strength,) = self.depths, self.ways, self.strengths
        index = layer_at(model, depth)
        direction = contrast(model, given, index, self.sequences)

        def change(hidden: torch.Tensor) -> torch.Tensor:
            vector = direction.to(hidden)
            if way == "add":
                return hidden + strength * vector
            unit = vector / vector.norm().clamp_min(1e-12)
            return hidden - strength * (hidden @ unit)[..., None] * unit

        change_layer(model, given, index, change)

    def effort(self) -> Effort:
        return Effort(2 * math.ceil(self.sequences / BATCH), BATCH, 1)


def contrast(model: PreTrainedModel, given: Given, index: int, sequences: int) -> torch.Tensor:
    """Returns ``mean(h | forget) - mean(h | retain)`` of a layer, ``[d]`` float64, over so many sequences of each."""

    def mean(text: Sequences) -> torch.Tensor:
        return mean_outputs(model, text.take(slice(0, sequences)), [index])[index]

    return mean(given.forget) - mean(given.retain)
