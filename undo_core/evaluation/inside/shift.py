"""Principal shift: how far a layer's mean activation has moved along the other model's first principal direction.

``|(mean x - mean y) . u| / sqrt(lambda)`` with the outputs ``x`` of the measured model and ``y`` of the other on the same tokens,
and the first principal direction ``u`` of ``y`` with its variance ``lambda``: a distance in standard deviations, so that layers
compare. The shift of centroids along principal directions in unlearned models: Xu et al. 2025 (arXiv 2505.16831).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel

from undo_core.evaluation.measurement import Curve, Measurement, Texts
from undo_core.evaluation.moments import joint_moments, moment_bytes


@dataclass(frozen=True)
class Shift(Measurement):
    """Shift of the activations of each layer along another model's principal direction.

    Attributes:
        kind: shift.
    """

    kind: Literal["shift"] = "shift"
    value = "principal shift, standard deviations"

    def curve(self, model: PreTrainedModel, texts: Texts) -> Curve:
        curve: Curve = []
        for layer, moments in enumerate(joint_moments(model, texts.reference(), self.read(texts.score), one_width=True), 1):
            variances, directions = torch.linalg.eigh(moments.yy)
            moved = float((moments.means[0] - moments.means[1]) @ directions[:, -1])
            variance = float(variances[-1])
            curve.append((layer, abs(moved) / variance**0.5 if variance > 0 else None))
        return curve

    def passes(self, layers: int) -> int:
        return 2

    def held(self, model: PreTrainedModel) -> int:
        return moment_bytes(model)
