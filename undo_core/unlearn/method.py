"""What an unlearning method is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from undo_core.training.loop import Loss


@dataclass(frozen=True)
class Method:
    """A loss over the sources ``forget`` and ``retain``, and the parameters it trains (None: all)."""

    loss: Loss
    parameters: list[nn.Parameter] | None = None

    @contextlib.contextmanager
    def alone(self, model: nn.Module) -> Iterator[None]:
        """Only what the method trains requires a gradient inside the ``with`` block; everything as it was afterwards."""
        if self.parameters is None:
            yield
            return
        before = [(p, p.requires_grad) for p in model.parameters()]
        try:
            model.requires_grad_(False)
            for parameter in self.parameters:
                parameter.requires_grad_(True)
            yield
        finally:
            for parameter, required in before:
                parameter.requires_grad_(required)
