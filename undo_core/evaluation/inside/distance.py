"""Relative L2 distance of the weights of each layer from those of another model.

``|theta_l - theta'_l|_2 / |theta'_l|_2`` over all parameters of layer ``l``; at 0 over those outside of the layers (embeddings,
final norm, head). That the distance from the original predicts how well a model resists relearning: Siddiqui et al. 2025 (arXiv
2505.22310).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel

from undo_core.evaluation.measurement import Curve, Measurement, Texts
from undo_core.models.layers import owner_of_layers
from undo_core.models.pairs import paired


@dataclass(frozen=True)
class Distance(Measurement):
    """Relative distance of the weights from another model's, layer by layer. Reads no text.

    Attributes:
        kind: distance.
    """

    kind: Literal["distance"] = "distance"
    reads = False
    value = "relative L2 distance of the weights"

    def curve(self, model: PreTrainedModel, texts: Texts) -> Curve:
        owner, name = owner_of_layers(model)
        of_layer = {
            id(parameter): index for index, layer in enumerate(getattr(owner, name), 1) for parameter in layer.parameters()
        }
        layers = {key: of_layer.get(id(parameter), 0) for key, parameter in model.named_parameters()}
        squares: dict[int, list[float]] = {}
        for key, (own, other) in paired(model, texts.reference(), "against").items():
            sums = squares.setdefault(layers[key], [0.0, 0.0])
            sums[0] += float((own.double() - other.double()).square().sum())
            sums[1] += float(other.double().square().sum())
        return [(at, (moved / size) ** 0.5 if size > 0 else None) for at, (moved, size) in sorted(squares.items())]

    def passes(self, layers: int) -> int:
        return 0
