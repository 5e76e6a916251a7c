"""Batches for unlearning and a model in the middle of it."""

import torch

from undo_core.training import sequence_source


def drawn(sequences, masked="forget"):
    """Returns a batch of forget and one of retain by name, and how many labels each counts; ``masked`` lacks some labels."""
    source = sequence_source(sequences, 12, 3)
    data = {"forget": source(0), "retain": source(1)}
    data[masked].mask[3] = False  # a sequence without labels
    data[masked].mask[5, 4:] = False
    return data, {name: batch.counted for name, batch in data.items()}


def changed(model, seed=1):
    """Returns the model with weights near those that it had, so that the two differ as in the middle of training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model
