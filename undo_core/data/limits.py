"""Limits of what a model can read (largest token id, number of positions), checked before data reaches it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from undo_core.data.sequences import Sequences
from undo_core.models import positions_of


@dataclass(frozen=True)
class Limits:
    """Limits that one or more models set on the sequences that all of them read.

    Attributes:
        vocabulary: entries of the smallest embedding or head; token ids must be below.
        positions: largest number of tokens that may be read from a sequence; None if no model has a limit.
        whole: whether a sequence's last token is read too; if not, it is only a label.
    """

    vocabulary: int
    positions: int | None
    whole: bool = False

    def check_sequences(self, sequences: Sequences, name: str) -> None:
        """Raises a ValueError if a model cannot read ``sequences``; ``name`` is the argument that the error names."""
        self.check(sequences.length, int(sequences.input_ids.min()), sequences.largest_id(), name)

    def check(self, length: int, smallest: int, largest: int, name: str) -> None:
        """Raises a ValueError if a model cannot read ``length`` tokens with ids from ``smallest`` to ``largest``."""
        if smallest < 0:
            raise ValueError(f"{name}: got token id {smallest}, wanted ids from 0")
        if largest >= self.vocabulary:
            raise ValueError(
                f"{name}: got token id {largest}, wanted ids below the model's vocabulary of {self.vocabulary}; prepare the "
                "data for this model"
            )
        taken = length if self.whole else length - 1
        if self.positions is not None and taken > self.positions:
            alone = "" if self.whole else ", of which the last is a label alone"
            raise ValueError(
                f"{name}: got sequences of {length} tokens{alone}, wanted sequences that take at most the model's "
                f"{self.positions} positions"
            )


def limits_of(*models: PreTrainedModel, whole: bool = False) -> Limits:
    """Returns the limits within which all of ``models`` can read sequences."""
    vocabularies = [layer.weight.shape[0] for model in models for layer in _ends(model)]
    return Limits(min(vocabularies), _least([positions_of(model.config) for model in models]), whole)


def _ends(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Returns the embedding and the head, as far as they have a matrix with a row for each vocabulary entry."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    return [layer for layer in layers if getattr(getattr(layer, "weight", None), "ndim", 0) == 2]


def _least(positions: list[int | None]) -> int | None:
    known = [count for count in positions if count is not None]
    return min(known) if known else None
