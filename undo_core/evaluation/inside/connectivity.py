"""Linear mode connectivity: the performance along the line from the measured model to another one.

``P(alpha)`` of the weights ``(1 - alpha) * theta + alpha * theta'``; the number is the barrier, the most by which a point is worse
than the straight line between the ends: ``max over alpha of [(1 - alpha) * P(0) + alpha * P(1) - P(alpha)]``, negated for a loss
(the barrier of Entezari et al. 2022, arXiv 2110.06296; that of Frankle et al. 2020, arXiv 1912.05671, is taken from the mean of both
ends, and agrees where the ends do equally well). Without a barrier both models lie in one basin. That a barrier between an unlearned model
and the original predicts resistance to relearning: Siddiqui et al. 2025 (arXiv 2505.22310).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from transformers import PreTrainedModel

from undo_core.evaluation.measurement import Curve, Measurement, Texts
from undo_core.evaluation.metrics import evaluate
from undo_core.models.pairs import on_the_line


@dataclass(frozen=True)
class Connectivity(Measurement):
    """Performance along the line to another model, and its barrier.

    Attributes:
        kind: connectivity.
        alphas: shares of the other model, from 0 to 1, both included.
    """

    kind: Literal["connectivity"] = "connectivity"
    alphas: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75, 1.0])
    axis = "share of the other model"
    value = "performance on the line"
    summary = "barrier"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alphas != sorted(set(self.alphas)) or len(self.alphas) < 3 or (self.alphas[0], self.alphas[-1]) != (0.0, 1.0):
            raise ValueError(
                f"alphas: got {self.alphas}, wanted increasing numbers from 0 to 1, both included, and one between"
            )

    def curve(self, model: PreTrainedModel, texts: Texts) -> Curve:
        reference, sequences = texts.reference(), self.read(texts.score)
        curve: Curve = []
        for alpha in self.alphas:
            with on_the_line(model, reference, alpha):
                curve.append((alpha, evaluate(model, sequences)["value"]))
        return curve

    def number(self, curve: Curve, higher: bool) -> float | None:
        values = [value if higher else -value for _, value in curve if value is not None]
        line = [(1 - alpha) * values[0] + alpha * values[-1] for alpha, _ in curve]
        return max(between - value for between, value in zip(line, values, strict=True))

    def passes(self, layers: int) -> int:
        return len(self.alphas)

    def held(self, model: PreTrainedModel) -> int:
        """The weights before they are moved."""
        return 4 * sum(parameter.numel() for parameter in model.parameters())
