"""Settings of the unlearning stage."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from undo_core.training.config import TrainConfig


@dataclass(frozen=True)
class RMUConfig:
    """Settings of RMU alone.

    As published for UNDO: arithmetic and language train layers 5 to 10 of 14 (``first_layer: 5, target_layer: 11``; their list names 11
    too, which the activations before it do not reach), coefficients 6 and 6.5, no retain term (``retain_weight: 0``), ``normalize: all``,
    ``direction: gaussian``; WMDP with Gemma 2 2B ``first_layer: 10, target_layer: 15``, coefficient 80. The original RMU draws a uniform
    direction.

    Attributes:
        first_layer: first layer whose matrices are trained (from 0).
        target_layer: the activations after this many layers are misdirected, before the final norm where these are all layers; layers
            below it, from ``first_layer``, are trained.
        coefficient: length of the misdirection; the published arithmetic setting is 6.
        trained: pattern of the trained parameters' names within a layer; GPT-NeoX calls them ``mlp.dense_4h_to_h.weight``.
        normalize: what the means are over: all (every position, padding included, as published), masked (the tokens that are labels)
            or sequence (each row's labels, then the rows that have any).
        direction: law of the misdirection's entries: gaussian or uniform on (0, 1).
    """

    first_layer: int = 0
    target_layer: int = 2
    coefficient: float = 6.0
    trained: str = "*mlp.down_proj.weight"
    normalize: Literal["all", "masked", "sequence"] = "masked"
    direction: Literal["gaussian", "uniform"] = "gaussian"

    def __post_init__(self) -> None:
        if not 0 <= self.first_layer < self.target_layer:
            raise ValueError(
                f"target_layer: got {self.target_layer}, wanted more than first_layer, {self.first_layer}, which is >= 0"
            )
        if not (math.isfinite(self.coefficient) and self.coefficient > 0):
            raise ValueError(f"coefficient: got {self.coefficient}, wanted a finite number > 0")
        if self.normalize not in ("all", "masked", "sequence"):
            raise ValueError(f"normalize: got {self.normalize!r}, wanted all, masked or sequence")
        if self.direction not in ("gaussian", "uniform"):
            raise ValueError(f"direction: got {self.direction!r}, wanted gaussian or uniform")


@dataclass(frozen=True)
class UnlearnConfig:
    """How the capability is suppressed.

    Attributes:
        method: maxent (uniform prediction on forget), graddiff (ascent on forget) or rmu (misdirected activations).
        retain_weight: factor on the retain term.
        rmu: settings of RMU alone.
        forget_rows: only this many of the labelled forget rows, the first, are used; None uses all.
        train: optimizer, rates, batch sizes.
    """

    method: Literal["maxent", "graddiff", "rmu"] = "maxent"
    retain_weight: float = 1.0
    rmu: RMUConfig = field(default_factory=RMUConfig)
    forget_rows: int | None = None
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=10, batch_size=40, lr=9e-5))

    def __post_init__(self) -> None:
        if self.method not in ("maxent", "graddiff", "rmu"):
            raise ValueError(f"method: got {self.method!r}, wanted maxent, graddiff or rmu")
        if not (math.isfinite(self.retain_weight) and self.retain_weight >= 0):
            raise ValueError(f"retain_weight: got {self.retain_weight}, wanted a finite number >= 0")
        if self.forget_rows is not None and self.forget_rows < 1:
            raise ValueError(f"forget_rows: got {self.forget_rows}, wanted an integer >= 1")

    def settings(self) -> dict[str, Any]:
        """As JSON values, without what is left at the default of being absent."""
        values = dataclasses.asdict(self)
        if self.forget_rows is None:
            del values["forget_rows"]
        return values
