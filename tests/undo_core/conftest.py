"""Fixtures that the tests of the method share: a tiny model and a little arithmetic."""

import pytest
import torch
from answered_sequences import answered

from undo_core.models import build_model

TINY = {
    "model_type": "gemma2",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "max_position_embeddings": 64,
    "sliding_window": 64,
}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tokenizer():
    from undo_core.data.tokenizers import character_tokenizer

    return character_tokenizer("0123456789+-*/=")


@pytest.fixture
def tiny(tokenizer):
    """Makes a tiny model from a seed."""
    return lambda seed=0: build_model(TINY, tokenizer, seed)


@pytest.fixture
def sequences(tokenizer):
    """Returns a hundred additions of digits, one per sequence."""
    return answered(tokenizer, (f"{a}+{b}={a + b}" for a in range(10) for b in range(10)))
