"""Logit lens: the performance of the model's own final norm and head on the outputs of an earlier layer.

``P(softmax(head(norm(h_l))))`` for the outputs ``h_l`` of layer ``l`` (nostalgebraist 2020; Belrose et al. 2023, arXiv
2303.08112). A capability that the last layers hide shows up before them; unlearned knowledge found so: Patil et al. 2023 (arXiv
2309.17410). At the last layer it is the model's own performance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel

from undo_core.evaluation.measurement import Curve, Measurement, Texts
from undo_core.evaluation.metrics import evaluate
from undo_core.models import head_of
from undo_core.models.layers import change_output, find_layers, kept_outputs


@dataclass(frozen=True)
class LogitLens(Measurement):
    """Performance of the final norm and the head on the outputs of each layer.

    Attributes:
        kind: logit_lens.
    """

    kind: Literal["logit_lens"] = "logit_lens"
    compares = False
    value = "performance of the logit lens"
    summary = "best before the last layer"

    def curve(self, model: PreTrainedModel, texts: Texts) -> Curve:
        head_of(model)  # measures the head before the hidden states change
        layers, sequences = find_layers(model), self.read(texts.score)
        curve: Curve = []
        for index in range(len(layers)):
            with kept_outputs(model, [index]) as kept:
                handle = change_output(layers[-1], lambda hidden, kept=kept, index=index: kept[index])
                try:
                    curve.append((index + 1, evaluate(model, sequences)["value"]))
                finally:
                    handle.remove()
        return curve

    def number(self, curve: Curve, higher: bool) -> float | None:
        values = [value for _, value in curve[:-1] if value is not None]
        return (max if higher else min)(values, default=None)

    def passes(self, layers: int) -> int:
        return layers
