"""Activation patching: one layer of the attacked model outputs what that layer of the original does for the same tokens.

``h_l(x) <- h_l(x; original)`` at every position (Meng et al. 2022, arXiv 2202.05262; Zhang and Nanda 2023, arXiv 2309.16042).
What the layers above the patch then predict shows how much of the capability they still hold: at depth 1 only the final norm and
the head are the attacked model's. It needs the original, so that the worst case leaves it out. For patching in the other
direction see the measure ``patching``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel

from undo_core.attacks.intervention import Given, Intervention, check_numbers, grid
from undo_core.models.layers import layer_at, patched


@dataclass(frozen=True)
class Patch(Intervention):
    """Replaces the outputs of one layer by those of the original model.

    Attributes:
        kind: patch.
        depths: where, each a share of the layers above 0 and up to 1: 1 is after the last layer.
    """

    kind: Literal["patch"] = "patch"
    depths: list[float] = grid("depth", 0.25, 0.5, 0.75, 1.0)
    needs_original = True

    def __post_init__(self) -> None:
        check_numbers("depths", self.depths, 0, 1, above=True)

    def apply(self, model: PreTrainedModel, given: Given) -> None:
        (depth,) = self.depths
        given.undone.enter_context(patched(model, given.original(), layer_at(model, depth)))
