"""Gives a model with a tied head a head of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from undo_core.models import load_model, load_tokenizer
from undo_core.models.untying import check_tied, untied
from undo_core.pipeline.model_stage import save
from undo_core.pipeline.needs import Memory
from undo_core.pipeline.stage import Folder, Stage, Work

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from undo_core.pipeline.memory.meta import Meta


@dataclass(frozen=True, kw_only=True)
class Untie(Stage):
    """Writes the same model with a head of its own; every stage that works on it trains and stores one more matrix.

    Attributes:
        model: a model whose head shares the embedding's weight.
    """

    kind = "untie"
    unties = True
    model: Stage | Folder

    def run(self, work: Work) -> dict[str, Any]:
        source = work.inputs["model"]
        model = untied(load_model(source, self.stored()))
        save(model, load_tokenizer(source), work.output)
        return {"parameters": sum(parameter.numel() for parameter in model.parameters())}

    def check(self, model: PreTrainedModel) -> None:
        check_tied(model)

    def memory(self, meta: Meta) -> list[Memory]:
        return [Memory("loading", weights=meta.stored.itemsize * meta.elements + meta.reading(meta.stored))]
