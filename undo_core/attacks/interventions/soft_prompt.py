"""Soft prompt: ``k`` learned embeddings before the text, an attack in the space of embeddings rather than of tokens.

``p(x | e_1 ... e_k)`` with ``e`` minimising the cross-entropy of forget training text (prompt tuning, Lester et al. 2021, arXiv
2104.08691); the evaluation puts the same embeddings before other forget text. As an attack on unlearning: Schwinn et al. 2024
(arXiv 2402.09063). Any prompt of ``k`` tokens is among those searched.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from undo_core.attacks.intervention import Effort, Given, Intervention, Prompted, check_counts, check_numbers, grid
from undo_core.attacks.tuning import tune
from undo_core.data.sequences import Sequences
from undo_core.models import head_of, positions_of
from undo_core.training import sequence_source
from undo_core.training.batches import Batch


@dataclass(frozen=True)
class SoftPrompt(Intervention):
    """Puts trained embeddings before every sequence.

    Attributes:
        kind: soft_prompt.
        tokens: numbers of embeddings.
        rates: learning rates of Adam, as shares of the mean size of the components of the model's embeddings.
        steps: steps of Adam.
        batch_size: sequences in a step.
    """

    kind: Literal["soft_prompt"] = "soft_prompt"
    tokens: list[int] = grid("tokens", 1, 8)
    rates: list[float] = grid("rate", 0.1, 0.3)
    steps: int = 100
    batch_size: int = 16
    draws = True

    def __post_init__(self) -> None:
        check_numbers("tokens", self.tokens, 1, 4096)
        check_numbers("rates", self.rates, 0, math.inf, above=True)
        check_counts(steps=self.steps, batch_size=self.batch_size)

    def apply(self, model: PreTrainedModel, given: Given) -> Prompted:
        (count,), (rate,) = self.tokens, self.rates
        positions = positions_of(model.config)
        if positions is not None and given.forget.length - 1 + count > positions:
            raise ValueError(
                f"tokens: got {count} before sequences of {given.forget.length} tokens, which need {given.forget.length - 1 + count} "
                f"positions; wanted at most the model's {positions}"
            )
        head_of(model)  # measures the head on text without the prompt
        embedding = model.get_input_embeddings()
        generator = torch.Generator().manual_seed(given.seed)
        known = given.forget.input_ids[given.forget.text_mask()].unique()
        begin = known[torch.randint(len(known), (count,), generator=generator)].long().to(embedding.weight.device)
        with torch.no_grad():
            prompt = embedding(begin).float().clone().requires_grad_(True)
            size = float(prompt.square().mean().sqrt())

        def put(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            own = prompt.to(output.dtype).expand(len(output), -1, -1)
            return torch.cat([own, output[:, count:]], dim=1)

        given.undone.callback(embedding.register_forward_hook(put).remove)
        source = sequence_source(given.forget, self.batch_size, given.seed)
        tune(model, prompt, lambda step: _longer(source(step), count), steps=self.steps, rate=rate * size)
        return lambda sequences: prefixed(sequences, count)

    def effort(self) -> Effort:
        return Effort(self.steps, self.batch_size, 2)


def prefixed(sequences: Sequences, count: int) -> tuple[Sequences, torch.Tensor]:
    """Puts ``count`` tokens that stand for the prompt before each sequence; they do not count.

    As after few-shot examples, each sequence is then one text without document boundaries: isolated documents would not attend
    to the prompt.
    """
    before = torch.zeros(len(sequences), count, dtype=torch.bool)
    ids = torch.cat([before.to(sequences.input_ids.dtype), sequences.input_ids], dim=1)
    answers = None if sequences.answer_mask is None else torch.cat([before, sequences.answer_mask], dim=1)
    text = sequences.text_mask()
    text[:, 0] = False  # without the prompt, nothing predicts it
    longer = {"input_ids": ids, "answer_mask": answers, "lengths": sequences.lengths + count, "starts": None}
    return dataclasses.replace(sequences, **longer), torch.cat([before, text], dim=1)


def _longer(batch: Batch, count: int) -> Batch:
    """The batch with ``count`` tokens that stand for the prompt before each sequence."""
    before = torch.zeros(len(batch.input_ids), count, dtype=batch.input_ids.dtype)
    mask = batch.mask.clone()
    mask[:, 0] = False
    return Batch(torch.cat([before, batch.input_ids], dim=1), torch.cat([before.bool(), mask], dim=1))
