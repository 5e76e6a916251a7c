"""Evaluates a model under an attack that trains nothing; the only output is the manifest, with one point of a curve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from undo_core.attacks import few_shot, quantise_
from undo_core.data.encoding import encoded, surroundings
from undo_core.evaluation.metrics import evaluate
from undo_core.models import load_model, load_tokenizer, positions_of
from undo_core.pipeline.model_stage import ModelStage
from undo_core.pipeline.needs import Cost, Memory, Scene
from undo_core.pipeline.prepared import load_split, tested_sequences
from undo_core.pipeline.stage import Folder, Stage, Work, optional

if TYPE_CHECKING:
    from undo_core.pipeline.memory.meta import Meta


@dataclass(frozen=True, kw_only=True)
class Probe(ModelStage):
    """Evaluates a model that is prompted with solved examples, or whose weights are rounded.

    Attributes:
        attack: fewshot or quantise.
        shots: number of solved examples before each prompt (fewshot).
        seed: seed of the draw of the examples (fewshot).
        bits: bits of a weight (quantise).
        group_size: columns that share a scale (quantise).
        model: the attacked model.
    """

    kind = "probe"
    attack: str
    shots: int | None = optional()
    seed: int | None = optional()
    bits: int | None = optional()
    group_size: int | None = optional()
    model: Stage | Folder

    def _json(self) -> dict[str, Any]:
        values = super()._json()
        return {"kind": values.pop("attack"), **values}

    def run(self, work: Work) -> dict[str, Any]:
        data = work.inputs["prepared"]
        model, tests = load_model(work.inputs["model"]), tested_sequences(data)
        if self.attack == "fewshot":
            examples, how = load_split(data, "valid_forget"), {"seed": self.seed, "positions": positions_of(model.config)}
            if examples.choices is not None:  # an answered question has no separator at its end
                tokenizer = load_tokenizer(data)
                how |= {"between": encoded(tokenizer, ["\n\n"])[0], "lead": surroundings(tokenizer, "\n\n")[0]}
            prompted = {name: few_shot(sequences, examples, self.shots, **how) for name, sequences in tests.items()}
            facts = {"length": prompted["forget"][0].length}
            scores = {name: evaluate(model, sequences, counted=counted) for name, (sequences, counted) in prompted.items()}
        else:
            facts = {"quantised": quantise_(model, self.bits, self.group_size or 1)}
            scores = {name: evaluate(model, sequences) for name, sequences in tests.items()}
        point = {name: {key: score[key] for key in ("value", "low", "high", "n")} for name, score in scores.items()}
        return {"curve": [{"step": 0, **point}], **facts}

    def memory(self, meta: Meta) -> list[Memory]:
        """Memory of an evaluation; the examples before the prompts are not counted."""
        loading = Memory("loading", weights=4 * meta.elements + meta.reading(torch.float32))
        model = meta.model()
        meta.hold([*model.parameters(), *model.buffers()], "weights")
        with meta.counted("evaluation"):
            meta.evaluate(model)
        return [loading, *meta.peaks()]

    def cost(self, scene: Scene) -> Cost:
        """No steps, and only a manifest on disk."""
        return Cost(disk=0)
