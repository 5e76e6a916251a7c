"""What a model can read: ids below its vocabulary, rows within its positions. Refused where data reaches a model, not inside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from undo_core.data.rows import Rows
from undo_core.models import positions_of

if TYPE_CHECKING:
    from undo_core.training.batches import Batch


@dataclass(frozen=True)
class Limits:
    """Of one or more models that read the same rows.

    Attributes:
        vocabulary: rows of the smallest embedding or head.
        positions: that a row may take; None where no model has a limit.
        whole: whether a row's last token is read too; elsewhere it is a label alone.
    """

    vocabulary: int
    positions: int | None
    whole: bool = False

    def check_rows(self, rows: Rows, name: str) -> None:
        """Raise a ValueError where a model cannot read ``rows``; ``name`` is the argument that they came by."""
        self._check(rows.length, rows.largest_id(), int(rows.input_ids.min()), name)

    def check_batch(self, batch: Batch, name: str) -> None:
        """The same, of a batch: its labels and positions too."""
        columns = [batch.input_ids] if batch.labels is None else [batch.input_ids, batch.labels[batch.mask]]
        ends = [column.aminmax() for column in columns if column.numel()]
        self._check(batch.input_ids.shape[1], max(int(end.max) for end in ends), min(int(end.min) for end in ends), name)
        last = -1 if batch.position_ids is None else int(batch.position_ids.max())
        if self.positions is not None and last >= self.positions:
            raise ValueError(f"{name}: got position {last}, wanted positions below the model's {self.positions}")

    def _check(self, length: int, largest: int, smallest: int, name: str) -> None:
        if smallest < 0:
            raise ValueError(f"{name}: got token id {smallest}, wanted ids from 0")
        if largest >= self.vocabulary:
            raise ValueError(
                f"{name}: got token id {largest}, wanted ids below the model's vocabulary of {self.vocabulary}; prepare the data for "
                f"this model"
            )
        taken = length if self.whole else length - 1
        if self.positions is not None and taken > self.positions:
            alone = "" if self.whole else ", of which the last is a label alone"
            raise ValueError(
                f"{name}: got rows of {length} tokens{alone}, wanted rows that take at most the model's {self.positions} positions"
            )


def limits_of(*models: PreTrainedModel, whole: bool = False) -> Limits:
    """The limits of what all of ``models`` read."""
    vocabularies = [layer.weight.shape[0] for model in models for layer in _ends(model)]
    return Limits(min(vocabularies), _least([positions_of(model.config) for model in models]), whole)


def _ends(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The embedding and the head, those of them that are a table of the vocabulary."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    return [layer for layer in layers if getattr(getattr(layer, "weight", None), "ndim", 0) == 2]


def _least(positions: list[int | None]) -> int | None:
    known = [count for count in positions if count is not None]
    return min(known) if known else None
