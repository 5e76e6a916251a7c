"""Latent adversarial perturbation: one vector, added to a layer's outputs, that brings the forget text back.

``h <- h + delta`` at every position, with ``delta`` minimising the cross-entropy of forget training text under
``|delta| <= radius * mean |h|``, by projected Adam; it is evaluated on the test text, all of which the one vector must serve.
Perturbations of activations as an attack, one for each prompt: Casper et al. 2024 (arXiv 2403.05030); this is the universal one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel

from undo_core.attacks.intervention import Effort, Given, Intervention, change_layer, check_counts, check_numbers, grid
from undo_core.attacks.tuning import tune
from undo_core.evaluation.activations import outputs_of
from undo_core.models.layers import layer_at
from undo_core.training import sequence_source


@dataclass(frozen=True)
class Latent(Intervention):
    """Adds a trained vector of bounded size to a layer's outputs.

    Attributes:
        kind: latent.
        depths: where, each a share of the layers above 0 and up to 1: 1 is after the last layer.
        radii: largest sizes of the vector, each as a share of the mean size of the layer's outputs on forget text.
        steps: steps of Adam; a tenth of the radius each at first.
        batch_size: sequences in a step.
    """

    kind: Literal["latent"] = "latent"
    depths: list[float] = grid("depth", 0.25, 0.5, 0.75)
    radii: list[float] = grid("radius", 0.3, 1.0)
    steps: int = 100
    batch_size: int = 16
    draws = True

    def __post_init__(self) -> None:
        check_numbers("depths", self.depths, 0, 1, above=True)
        check_numbers("radii", self.radii, 0, math.inf)
        check_counts(steps=self.steps, batch_size=self.batch_size)

    def apply(self, model: PreTrainedModel, given: Given) -> None:
        (depth,), (radius,) = self.depths, self.radii
        index = layer_at(model, depth)
        sizes = [outputs[index].norm(dim=1) for outputs in outputs_of(model, given.forget.take(slice(0, 64)), [index])]
        largest = radius * float(torch.cat(sizes).mean())
        width, like = model.get_input_embeddings().weight.shape[1], next(model.parameters())
        vector = torch.zeros(width, dtype=torch.float32, device=like.device, requires_grad=True)

        def project(vector: torch.Tensor) -> torch.Tensor:
            return vector * (largest / vector.norm().clamp_min(1e-30)).clamp_max(1.0)

        change_layer(model, given, index, lambda hidden: hidden + vector.to(hidden.dtype))
        source = sequence_source(given.forget, self.batch_size, given.seed)
        tune(model, vector, source, steps=self.steps, rate=largest / math.sqrt(width) / 10, project=project)

    def effort(self) -> Effort:
        return Effort(self.steps, self.batch_size, 2)
