"""What an unlearning method is."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from undo_core.training.loop import Loss


@dataclass(frozen=True)
class Method:
    """A loss over the sources ``forget`` and ``retain``, and the parameters it trains (None: all)."""

    loss: Loss
    parameters: list[nn.Parameter] | None = None
