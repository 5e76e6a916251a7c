"""Writes the noise N to a file, which shows what noise a damaged checkpoint received."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from undo_kernels.ops.noise_rules import NoiseRule

from undo_core.noise.checkpoint import write_replay
from undo_core.pipeline.needs import Memory
from undo_core.pipeline.stage import Folder, Stage, Work

if TYPE_CHECKING:
    from undo_core.pipeline.memory.meta import Meta


@dataclass(frozen=True, kw_only=True)
class Replay(Stage):
    """Draws N for the parameters of a model.

    Attributes:
        pattern: glob over the names of the parameters whose noise is written.
        rules: other settings for some parameters.
        law: distribution of N.
        seed: seed of N.
        std: standard deviation of the normal law.
        model: model that gives the names and shapes of the parameters.
    """

    kind = "replay"
    pattern: str
    rules: tuple[NoiseRule, ...]
    law: str
    seed: int
    std: float | None
    model: Stage | Folder

    def run(self, work: Work) -> dict[str, Any]:
        drawn = write_replay(
            work.inputs["model"],
            work.output / "noise.safetensors",
            self.pattern,
            seed=self.seed,
            law=self.law,
            std=self.std,
            rules=self.rules,
        )
        return {"tensors": drawn}

    def memory(self, meta: Meta) -> list[Memory]:
        return [Memory("loading", weights=4 * meta.elements)]
