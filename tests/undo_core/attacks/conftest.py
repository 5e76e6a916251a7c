"""The models and text that the attacks are tested on."""

import copy
import itertools

import pytest
import torch
from answered_sequences import answered
from attacked_models import SHAPE

from undo_core.data.sequences import Sequences
from undo_core.data.tokenizers import character_tokenizer
from undo_core.models import build_model
from undo_core.training import TrainConfig, sequence_source, train
from undo_core.training.losses import cross_entropy
from undo_core.unlearning import UnlearnConfig, unlearn


@pytest.fixture(scope="module")
def world():
    """Returns a tokenizer, forget and retain sequences, the model that knows both, and the unlearned model.

    The sequences are all products and all sums of two digits below five.
    """
    torch.set_num_threads(1)
    tokenizer = character_tokenizer("0123456789+-*/=")
    pairs = list(itertools.product(range(5), repeat=2))
    forget = answered(tokenizer, (f"{a}*{b}={a * b}" for a, b in pairs))
    retain = answered(tokenizer, (f"{a}+{b}={a + b}" for a, b in pairs))
    both = Sequences(torch.cat([forget.input_ids, retain.input_ids]), 0)
    original = build_model(SHAPE, tokenizer, 0)
    loss = lambda m, b, c: cross_entropy(m, b["text"], c["text"])  # noqa: E731
    config = TrainConfig(steps=200, batch_size=50, lr=5e-3, schedule="cosine")
    train(original, loss, {"text": sequence_source(both, 50, 0)}, config, progress=False)
    unlearned = copy.deepcopy(original)
    how = UnlearnConfig(train=TrainConfig(steps=40, batch_size=25, lr=2e-3))
    unlearn(unlearned, forget=forget, retain=retain, config=how, progress=False)
    return tokenizer, forget, retain, original, unlearned
