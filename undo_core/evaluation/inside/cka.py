"""Linear CKA: how alike two models' activations are, up to rotation and scale.

``CKA = |X^T Y|_F^2 / (|X^T X|_F |Y^T Y|_F)`` with the centred outputs ``[tokens, d]`` of the same layer of both models on the same
tokens (Kornblith et al. 2019, arXiv 1905.00414): 1 if they agree up to an orthogonal map and a factor, near 0 if they have nothing
in common. It is the plain estimator, which is biased upwards when there are few tokens for each dimension: compare values over the
same text only. On unlearned models: Xu et al. 2025 (arXiv 2505.16831).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel

from undo_core.evaluation.measurement import Curve, Measurement, Texts
from undo_core.evaluation.moments import Moments, joint_moments, moment_bytes


@dataclass(frozen=True)
class Cka(Measurement):
    """Similarity of the activations of each layer with those of another model.

    Attributes:
        kind: cka.
    """

    kind: Literal["cka"] = "cka"
    value = "linear CKA"

    def curve(self, model: PreTrainedModel, texts: Texts) -> Curve:
        moments = joint_moments(model, texts.reference(), self.read(texts.score))
        return [(layer, cka_of(own)) for layer, own in enumerate(moments, 1)]

    def passes(self, layers: int) -> int:
        return 2

    def held(self, model: PreTrainedModel) -> int:
        return moment_bytes(model)


def cka_of(moments: Moments) -> float | None:
    """Linear CKA of a layer; None if a model's outputs do not vary."""
    size = float(moments.xx.norm() * moments.yy.norm())
    return float(moments.xy.square().sum()) / size if size > 0 else None
