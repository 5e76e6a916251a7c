"""Patching scores: how much of the other model's performance survives if one of its layers outputs what the measured model's does.

``score_l = (P(other with h_l of the model) - P(model)) / (P(other) - P(model))``: 1 if the outputs of layer ``l`` of the measured
model still hold all that the upper layers of the other model need, 0 if nothing more than the measured model uses itself
(activation patching, Meng et al. 2022, arXiv 2202.05262; Zhang and Nanda 2023, arXiv 2309.16042; applied to unlearning by Hong et
al. 2024, arXiv 2410.06606). n/a if the two performances differ by less than 0.01.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel

from undo_core.evaluation.measurement import Curve, Measurement, Texts
from undo_core.evaluation.metrics import evaluate
from undo_core.models.layers import find_layers, patched

LEAST = 0.01  # difference of the performances below which the score is not defined


@dataclass(frozen=True)
class Patching(Measurement):
    """Scores of patching the outputs of each layer into another model.

    Attributes:
        kind: patching.
    """

    kind: Literal["patching"] = "patching"
    value = "patching score"

    def curve(self, model: PreTrainedModel, texts: Texts) -> Curve:
        reference, sequences = texts.reference(), self.read(texts.score)
        own, best = (evaluate(each, sequences)["value"] for each in (model, reference))
        curve: Curve = []
        for index in range(len(find_layers(model))):
            with patched(reference, model, index, "against"):
                value = evaluate(reference, sequences)["value"]
            curve.append((index + 1, None if abs(best - own) < LEAST else (value - own) / (best - own)))
        return curve

    def passes(self, layers: int) -> int:
        return 2 + 2 * layers
