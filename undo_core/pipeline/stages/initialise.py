"""Initialises a model of the same architecture from another seed: the random student."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from undo_core.checkpoints.files import settled_configuration
from undo_core.models import initialise, load_tokenizer
from undo_core.pipeline.model_stage import save
from undo_core.pipeline.needs import Memory
from undo_core.pipeline.stage import Folder, Stage, Work

if TYPE_CHECKING:
    from undo_core.pipeline.memory.meta import Meta


@dataclass(frozen=True, kw_only=True)
class Initialise(Stage):
    """Makes a randomly initialised model.

    Attributes:
        seed: seed of the initialisation.
        model: model whose architecture and tokenizer are used.
    """

    kind = "initialise"
    seed: int
    model: Stage | Folder

    def run(self, work: Work) -> dict[str, Any]:
        source = work.inputs["model"]
        model = initialise(settled_configuration(source), self.seed)
        save(model, load_tokenizer(source), work.output)
        return {}

    def stored(self) -> torch.dtype:
        return torch.float32

    def memory(self, meta: Meta) -> list[Memory]:
        return [Memory("loading", weights=4 * meta.elements)]
