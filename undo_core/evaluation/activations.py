"""The outputs of a model's layers on text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel

from undo_core.data.limits import limits_of
from undo_core.data.sequences import Sequences
from undo_core.models import evaluating, hidden_states
from undo_core.models.layers import find_layers, kept_outputs

TOKENS = 2048  # tokens in a forward pass, whose outputs of all layers are held together


@torch.no_grad()
def outputs_of(
    model: PreTrainedModel, sequences: Sequences, indices: Sequence[int] | None = None
) -> Iterator[dict[int, torch.Tensor]]:
    """Yields, for each batch of sequences, the outputs ``[tokens, d]`` of layers at the tokens that are no padding.

    Args:
        model: the model; it runs in evaluation mode.
        sequences: text.
        indices: indices of the layers, from 0; None for all.

    Memory: the outputs of the layers for 2,048 tokens, or for one sequence if that is longer.

    Raises:
        ValueError: the sequences have a token outside the model's vocabulary, or more tokens than the model has positions.
    """
    limits_of(model).check_sequences(sequences, "sequences")
    device, size = next(model.parameters()).device, max(1, TOKENS // sequences.length)
    chosen = range(len(find_layers(model))) if indices is None else indices
    with evaluating(model), kept_outputs(model, chosen) as kept:
        for index in torch.arange(len(sequences)).split(size):
            ids, positions = sequences.input_ids[index].long().to(device), sequences.position_ids(index)
            hidden_states(model, ids, None, None if positions is None else positions.to(device))
            text = sequences.text_mask(index).to(device)
            yield {layer: kept[layer][text].float() for layer in chosen}


def output_bytes(model: PreTrainedModel) -> int:
    """Bytes of the outputs of all layers that :func:`outputs_of` holds at a time, for sequences of at most 2,048 tokens."""
    return 2 * TOKENS * len(find_layers(model)) * model.get_input_embeddings().weight.shape[1] * 4


def mean_outputs(model: PreTrainedModel, sequences: Sequences, indices: Sequence[int]) -> dict[int, torch.Tensor]:
    """Returns the mean output ``[d]`` float64 of each layer over all tokens."""
    sums: dict[int, torch.Tensor] = {}
    count = 0
    for outputs in outputs_of(model, sequences, indices):
        count += len(outputs[indices[0]])
        sums = {layer: sums.get(layer, 0.0) + own.double().sum(0) for layer, own in outputs.items()}
    return {layer: total / count for layer, total in sums.items()}
