"""A tiny original model, a changed copy of it, and text, for tests of interventions and of measures."""

import copy

import torch

from undo_core.data.sequences import Sequences
from undo_core.data.tokenizers import character_tokenizer
from undo_core.models import build_model

SHAPE = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
}


def two_models(**shape):
    """Returns the original model and a model whose weights differ from it."""
    torch.set_num_threads(1)
    original = build_model({**SHAPE, **shape}, character_tokenizer("0123456789"), 0)
    changed = copy.deepcopy(original)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(0.3 * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return original, changed


def text(seed: int, count: int = 24, length: int = 12) -> Sequences:
    """Returns sequences of tokens drawn at random."""
    ids = torch.randint(2, 12, (count, length), generator=torch.Generator().manual_seed(seed))
    return Sequences(ids.int(), 0)
