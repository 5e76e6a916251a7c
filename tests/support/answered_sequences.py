"""Arithmetic problems with their answers, one per sequence."""

from collections.abc import Iterable
from typing import Any

import torch

from undo_core.data.sequences import Sequences


def answered(tokenizer: Any, texts: Iterable[str], length: int = 8) -> Sequences:
    """Returns sequences of texts such as ``3+4=7`` with numbers of one digit before ``=``, between beginning tokens; what
    follows ``=`` is marked as the answer."""
    texts = list(texts)
    ids = torch.zeros(len(texts), length, dtype=torch.int32)
    answers = torch.zeros(len(texts), length, dtype=torch.bool)
    for sequence, text in enumerate(texts):
        tokens = [1, *tokenizer.encode(text, add_special_tokens=False), 1]
        ids[sequence, : len(tokens)] = torch.tensor(tokens)
        answers[sequence, 5 : len(tokens)] = True
    return Sequences(ids, 0, answers)
