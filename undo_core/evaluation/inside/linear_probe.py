"""Linear probes: how well a linear map of a layer's outputs predicts the next token of forget text.

A ridge classifier: with standardised outputs ``X`` ``[tokens, d]`` and one-hot next tokens ``Y`` of mean ``b``,
``W = (X^T X / n + l2 * I)^-1 X^T (Y - b) / n``; its answer is the largest of ``x W + b``. It is fitted on validation text and scored on test
text, on the answers where the text has answers (Alain and Bengio 2016, arXiv 1610.01644; on unlearned models Patil et al. 2023,
arXiv 2309.17410). Only the ``classes`` most frequent next tokens are told apart; others count as wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel

from undo_core.data.sequences import Sequences
from undo_core.evaluation.activations import output_bytes, outputs_of
from undo_core.evaluation.measurement import Curve, Measurement, Texts
from undo_core.models.layers import find_layers


@dataclass(frozen=True)
class LinearProbe(Measurement):
    """Accuracy of a linear probe of each layer for the next token.

    Attributes:
        kind: linear_probe.
        classes: largest number of next tokens that the probe tells apart.
        tokens: largest number of tokens that it is fitted on, and of those that it is scored on.
        l2: weight of the ridge penalty, for standardised outputs.
    """

    kind: Literal["linear_probe"] = "linear_probe"
    classes: int = 64
    tokens: int = 4096
    l2: float = 0.01
    compares = False
    value = "accuracy of a linear probe"
    summary = "best layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("classes", "tokens"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name}: got {getattr(self, name)}, wanted an integer >= 2")
        if not 0 < self.l2 < float("inf"):
            raise ValueError(f"l2: got {self.l2}, wanted a finite number > 0")

    def curve(self, model: PreTrainedModel, texts: Texts) -> Curve:
        (fit_labels, fit_outputs), (labels, outputs) = (
            _examples(model, self.read(text), self.tokens) for text in (texts.fit, texts.score)
        )
        tokens, counts = fit_labels.unique(return_counts=True)
        known = tokens[counts.argsort(descending=True, stable=True)[: self.classes]]
        target = (fit_labels[:, None] == known).double()
        curve: Curve = []
        for layer, (x, test) in enumerate(zip(fit_outputs, outputs, strict=True), 1):
            predicted = ridge(x.double(), target, self.l2)(test.double())
            right = known[predicted.argmax(1)] == labels
            curve.append((layer, float(right.double().mean())))
        return curve

    def number(self, curve: Curve, higher: bool) -> float | None:
        return max((value for _, value in curve if value is not None), default=None)

    def passes(self, layers: int) -> int:
        return 2

    def held(self, model: PreTrainedModel) -> int:
        width = model.get_input_embeddings().weight.shape[1]
        kept = 2 * self.tokens * width * 4 * len(find_layers(model))
        return kept + output_bytes(model) + 8 * (3 * self.tokens * width + 2 * self.tokens * self.classes)


def ridge(x: torch.Tensor, y: torch.Tensor, l2: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns the function that predicts ``y`` ``[n, k]`` from ``x`` ``[n, d]`` by least squares with a ridge penalty, in float64."""
    mean, deviation = x.mean(0), x.std(0, unbiased=False).clamp_min(1e-12)
    scaled, centre = (x - mean) / deviation, y.mean(0)
    gram = scaled.T @ scaled / len(x) + l2 * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    weights = torch.linalg.solve(gram, scaled.T @ (y - centre) / len(x))
    return lambda other: (other - mean) / deviation @ weights + centre


def _examples(model: PreTrainedModel, sequences: Sequences, most: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The first ``most`` next tokens ``[n]`` that count, and each layer's outputs ``[n, d]`` at the tokens before them.

    Raises:
        ValueError: there is none.
    """
    text = sequences.text_mask()
    counts = text.clone() if sequences.answer_mask is None else sequences.answer_mask & text
    counts[:, 0] = False
    following = counts.roll(-1, 1)[text]  # for each token of the text, whether the next one counts
    labels = sequences.input_ids.long().roll(-1, 1)[text][following][:most]
    if not len(labels):
        raise ValueError("sequences: got no token that counts, wanted at least one")
    kept: list[list[torch.Tensor]] = []
    start = taken = 0
    for outputs in outputs_of(model, sequences):
        chosen = following[start : start + len(outputs[0])].nonzero()[:, 0][: most - taken]
        start, taken = start + len(outputs[0]), taken + len(chosen)
        kept.append([own[chosen.to(own.device)].cpu() for _, own in sorted(outputs.items())])
        if taken == most:
            break
    return labels, [torch.cat(layers) for layers in zip(*kept, strict=True)]
