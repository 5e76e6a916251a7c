"""Settings of the model that a run trains."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ModelConfig:
    """The model: an architecture to train from scratch, or a checkpoint to start from.

    Attributes:
        config: keyword arguments of the Hugging Face configuration, including ``model_type``.
        path: folder of a pretrained checkpoint; the run then skips pretraining.
        seed: seed of the initialisation; None derives it from the run's seed.
    """

    config: dict[str, Any] = field(default_factory=dict)
    path: str | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if bool(self.config) == bool(self.path):
            raise ValueError(
                "model: wanted either model.config (train from scratch) or model.path (a checkpoint folder), and not both"
            )
