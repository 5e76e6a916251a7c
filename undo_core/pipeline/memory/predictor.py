"""Predicted peak memory of stages."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import undo_kernels
from transformers import PreTrainedConfig
from undo_kernels.library.backends import choose

from undo_core.evaluation.metrics import sequences_at_once
from undo_core.io.files import hash_json
from undo_core.models.untying import untied_configuration
from undo_core.pipeline.memory.meta import Meta, Scored
from undo_core.pipeline.memory.planned_sharing import Exchanges
from undo_core.pipeline.memory.shards import Traffic
from undo_core.pipeline.needs import Memory
from undo_core.pipeline.stage import Stage

PROCESS_BYTES = 550 << 20  # measured resident size of Python with torch and transformers; not counted on a GPU


class Predictor:
    """Predicts peak memory of stages; stages whose memory must be equal are computed once.

    Args:
        config: configuration of the models, teachers included.
        length: tokens in a sequence.
        answers: whether evaluation scores answers; otherwise it computes cross-entropy.
        choices: letters that evaluation compares for a multiple-choice question; 0 if there are no questions.
        evaluated: sequences in an evaluation; None if unknown, for as many as an evaluation takes at once.
        evaluated_length: tokens in the longest of them; None for ``length``.
        data_bytes: bytes of the token ids that a stage holds.
        device: ``"cuda"`` or ``"cpu"``; None for the GPU if there is one.
        ranks: number of ranks that run a stage together; the memory is that of one of them.
        tensor: number of ranks that share a head.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        length: int,
        *,
        answers: bool = False,
        choices: int = 0,
        evaluated: int | None = None,
        evaluated_length: int | None = None,
        data_bytes: int = 0,
        device: str | None = None,
        ranks: int = 1,
        tensor: int = 1,
    ) -> None:
        self.config, self.length, self.data_bytes = config, length, data_bytes
        columns = evaluated_length or length
        most = sequences_at_once(columns)
        self.scored = Scored(min(most, evaluated or most), columns, answers, choices)
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.ranks, self.tensor = ranks, tensor
        self._known: dict[str, tuple[Memory, list[Traffic], Exchanges]] = {}

    def __call__(self, stage: Stage, stored: torch.dtype | None = None) -> Memory:
        """Returns the memory of a stage at its peak.

        Args:
            stage: the stage that would run.
            stored: dtype of the weights that it reads; None asks the stage.

        Raises:
            ValueError: the model does not support the settings.
        """
        return self._predicted(stage, stored)[0]

    def traffic(self, stage: Stage, stored: torch.dtype | None = None) -> list[Traffic]:
        """Returns what travels between the ranks in a step of the stage; empty for a stage that rank 0 runs alone."""
        return self._predicted(stage, stored)[1]

    def exchanges(self, stage: Stage, stored: torch.dtype | None = None) -> Exchanges:
        """Returns what the ranks that share a head exchange for it in a step of the stage; empty if each has a whole one."""
        return self._predicted(stage, stored)[2]

    def phases(self, stage: Stage, stored: torch.dtype | None = None) -> list[Memory]:
        """Returns the memory by parts at the peak of each phase."""
        return self._run(stage, stored)[0]

    def _predicted(self, stage: Stage, stored: torch.dtype | None = None) -> tuple[Memory, list[Traffic], Exchanges]:
        stored = stored or stage.reads()
        key = hash_json([stage.kind, _that_matter(stage.sized_by), sorted(stage.inputs), str(stored), stage.untied])
        if key not in self._known:
            phases, traffic, exchanges = self._run(stage, stored)
            self._known[key] = max(phases, key=lambda memory: memory.total), traffic, exchanges
        return self._known[key]

    def _run(self, stage: Stage, stored: torch.dtype | None) -> tuple[list[Memory], list[Traffic], Exchanges]:
        """Runs the stage's computation on the meta device."""
        ranks, tensor = (self.ranks, self.tensor) if stage.together else (1, 1)
        config = untied_configuration(self.config) if stage.untied else self.config
        meta = Meta(config, self.length, self.scored, self.device, stored or stage.reads(), ranks, tensor)
        with undo_kernels.backend(choose("vocab_loss", torch.device(self.device))):
            phases = stage.memory(meta)
        process = 0 if self.device == "cuda" else PROCESS_BYTES + self.data_bytes
        return [dataclasses.replace(memory, process=process) for memory in phases], meta.traffic, meta.sharing.exchanges


_NO_MATTER = (
    "steps",
    "lr",
    "min_lr",
    "schedule",
    "warmup",
    "weight_decay",
    "beta1",
    "beta2",
    "eps",
    "clip",
    "eval_every",
    "seed",
    "rate",
)


def _that_matter(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings on which memory depends."""
    return {k: _that_matter(v) if isinstance(v, dict) else v for k, v in settings.items() if k not in _NO_MATTER}
