"""Principal angle: whether the activations still vary most along the same direction.

``|u . v|`` with the first principal directions ``u`` and ``v`` of the outputs of one layer of both models on the same tokens: 1 if
they are parallel, 0 if they are orthogonal, n/a if the outputs of one do not vary. Cosine similarity of principal components of unlearned models: Xu et al. 2025 (arXiv
2505.16831).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel

from undo_core.evaluation.measurement import Curve, Measurement, Texts
from undo_core.evaluation.moments import joint_moments, moment_bytes


@dataclass(frozen=True)
class Angle(Measurement):
    """Cosine of the principal directions of each layer and of the same layer of another model.

    Attributes:
        kind: angle.
    """

    kind: Literal["angle"] = "angle"
    value = "cosine of the principal directions"

    def curve(self, model: PreTrainedModel, texts: Texts) -> Curve:
        curve: Curve = []
        for layer, moments in enumerate(joint_moments(model, texts.reference(), self.read(texts.score), one_width=True), 1):
            (own, first), (other, second) = (torch.linalg.eigh(each) for each in (moments.xx, moments.yy))
            varies = min(float(own[-1]), float(other[-1])) > 0  # without a variance the direction means nothing
            curve.append((layer, abs(float(first[:, -1] @ second[:, -1])) if varies else None))
        return curve

    def passes(self, layers: int) -> int:
        return 2

    def held(self, model: PreTrainedModel) -> int:
        return moment_bytes(model)
