"""Settings of the unlearning stage."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from undo_core.training.config import TrainConfig


@dataclass(frozen=True)
class RMUConfig:
    """Settings of RMU alone.

    Attributes:
        first_layer: first layer whose matrices are trained (from 0).
        target_layer: the activations after this many layers are misdirected; layers below it, from ``first_layer``, are trained.
        coefficient: length of the misdirection; the published arithmetic setting is 6.
        trained: pattern of the trained parameters' names within a layer.
    """

    first_layer: int = 0
    target_layer: int = 2
    coefficient: float = 6.0
    trained: str = "*mlp.down_proj.weight"

    def __post_init__(self) -> None:
        if not 0 <= self.first_layer < self.target_layer:
            raise ValueError(
                f"target_layer: got {self.target_layer}, wanted more than first_layer, {self.first_layer}, which is >= 0"
            )
        if not (math.isfinite(self.coefficient) and self.coefficient > 0):
            raise ValueError(f"coefficient: got {self.coefficient}, wanted a finite number > 0")


@dataclass(frozen=True)
class UnlearnConfig:
    """How the capability is suppressed.

    Attributes:
        method: maxent (uniform prediction on forget), graddiff (ascent on forget) or rmu (misdirected activations).
        retain_weight: factor on the retain term.
        rmu: settings of RMU alone.
        train: optimizer, rates, batch sizes.
    """

    method: Literal["maxent", "graddiff", "rmu"] = "maxent"
    retain_weight: float = 1.0
    rmu: RMUConfig = field(default_factory=RMUConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=10, batch_size=40, lr=9e-5))

    def __post_init__(self) -> None:
        if self.method not in ("maxent", "graddiff", "rmu"):
            raise ValueError(f"method: got {self.method!r}, wanted maxent, graddiff or rmu")
        if not (math.isfinite(self.retain_weight) and self.retain_weight >= 0):
            raise ValueError(f"retain_weight: got {self.retain_weight}, wanted a finite number >= 0")
