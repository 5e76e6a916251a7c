"""Measures what a model still holds inside; the only output is the manifest, with a curve over the layers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from undo_core.evaluation.inside import Measurement, Texts
from undo_core.io.untrusted import NUMBER, OPTIONAL, Shape
from undo_core.models import forward_flops, load_model
from undo_core.models.layers import find_layers
from undo_core.pipeline.model_stage import ModelStage
from undo_core.pipeline.needs import Cost, Memory, Scene
from undo_core.pipeline.prepared import load_split, tested_sequences
from undo_core.pipeline.stage import Folder, Stage, Work, optional

if TYPE_CHECKING:
    from undo_core.pipeline.memory.meta import Meta

BATCH = 8  # sequences that the plan takes for a batch


@dataclass(frozen=True, kw_only=True)
class Measure(ModelStage):
    """Takes one measure of a model.

    Attributes:
        measurement: the measure and its settings.
        model: the measured model.
        reference: the model that it is compared with, if the measure compares.
    """

    kind = "measure"
    entries: ClassVar[Shape] = {"points": [{"at": NUMBER, "value": OPTIONAL}]}
    time_from = "measures"
    measurement: Measurement
    model: Stage | Folder
    reference: Stage | Folder | None = optional()

    def _json(self) -> dict[str, Any]:
        return super()._json() | {"measurement": self.measurement.settings()}

    def run(self, work: Work) -> dict[str, Any]:
        data = work.inputs["prepared"]
        fit, score = {name: load_split(data, f"valid_{name}") for name in ("forget", "retain")}, tested_sequences(data)
        texts = Texts(fit, score, lambda: load_model(work.inputs["reference"]))
        with torch.no_grad():
            curve = self.measurement.curve(load_model(work.inputs["model"]), texts)
        return {"points": [{"at": at, "value": value} for at, value in curve]}

    def memory(self, meta: Meta) -> list[Memory]:
        """Memory of an evaluation, or of what the measure holds, with both models in memory."""
        models = [meta.model() for _ in range(2 if self.measurement.compares else 1)]
        loading = Memory("loading", weights=4 * meta.elements * len(models) + meta.reading(torch.float32))
        for model in models:
            meta.hold([*model.parameters(), *model.buffers()], "weights")
        with meta.counted("forward"):
            meta.touch("workspace", self.measurement.held(models[0]))
        with meta.counted("evaluation"):
            meta.evaluate(models[0])
        return [loading, *meta.peaks()]

    def cost(self, scene: Scene) -> Cost:
        """Forward passes over the largest number of sequences that are read, and only a manifest on disk."""
        passes = self.measurement.passes(len(find_layers(scene.model)))
        if not passes:
            return Cost(disk=0)
        steps = math.ceil(self.measurement.sequences / BATCH)
        positions = self.measurement.sequences * scene.length
        flops = passes * forward_flops(scene.model, scene.length) * positions
        return Cost(0, steps, BATCH, passes, positions * passes, flops)
