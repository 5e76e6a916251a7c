"""Scores a model on sequences, with 95 % intervals: exact match of greedy answers, multiple choice, or cross-entropy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from undo_core import distributed
from undo_core.data.limits import limits_of
from undo_core.data.sequences import Sequences
from undo_core.distributed.head_ops import linear_cross_entropy, logits_of, most_likely
from undo_core.distributed.sharding import run
from undo_core.io.untrusted import NUMBER, Shape
from undo_core.models import evaluating, head_of, hidden_states
from undo_core.models.vocabulary_parallel import has_same_tokens

_Z = 1.959964  # 97.5 % quantile of the normal distribution
POSITIONS = 16_384  # tokens in a forward pass by default, in at most 512 sequences
LARGEST = 3.4e38  # about the largest float32; stands in files for NaN and infinity, which JSON has not

# What files hold, as shapes: the score of a model on sequences, and its scores by name, each also by group.
SCORE: Shape = {"value": NUMBER, "low": NUMBER, "high": NUMBER, "n": int}
SCORES: Shape = {str: {**SCORE, "groups?": {str: SCORE}}}


def finite(value: float) -> float:
    """Returns ``value``, or :data:`LARGEST` for NaN and infinity."""
    return LARGEST if math.isnan(value) else max(-LARGEST, min(value, LARGEST))


@torch.no_grad()
def evaluate(
    model: PreTrainedModel, sequences: Sequences, *, batch_size: int | None = None, counted: torch.Tensor | None = None
) -> dict[str, Any]:
    """Scores ``model`` on ``sequences``: accuracy if they have answers, else mean cross-entropy in nats per token.

    Accuracy is the exact match of the greedy answer, terminator included. One forward pass over the reference text is enough:
    greedy decoding gives the reference answer exactly if, at every answer position, the most likely token given the reference
    tokens before it is right. For sequences with choices, accuracy is the share of sequences whose right letter is the
    likeliest of the letters. Sequences with answers run sorted by length, each batch cut to its last answer, and repeats of a
    sequence run once.

    Args:
        model: the model; each module keeps its training or evaluation mode. On several ranks each scores some of the batches;
            all of them if ranks share its head for the same tokens (:func:`undo_core.parallelize_head`).
        sequences: ``[n, length]`` token sequences.
        batch_size: sequences in a forward pass; None for 512, or fewer if those exceed 16,384 tokens.
        counted: ``[n, length]`` bool, the tokens whose cross-entropy counts; None for all but padding. Ignored for sequences
            with answers.

    Returns:
        ``value``; ``low`` and ``high``, its 95 % interval (Wilson's for accuracy, normal over sequences for cross-entropy);
        ``n``, the number of sequences; and ``groups``, the same for each group of sequences. The cross-entropy of a diverged
        model is never NaN: 3.4e38, about the largest float32, stands for NaN and infinity.

    Memory: a forward pass of one batch, and at most 2**25 logits.

    Raises:
        ValueError: the sequences have a token outside the model's vocabulary, or more tokens than the model has positions.
    """
    limits_of(model).check_sequences(sequences, "sequences")
    device = next(model.parameters()).device
    parts, order = [], []
    given, repeats = sequences, None
    if given.answer_mask is not None:
        sequences, repeats = given.distinct()
    batches = list(_batches(sequences, batch_size))
    # Ranks that share a head for the same tokens would mix their results if each scored other sequences.
    rank, count = (0, 1) if has_same_tokens(model) else (distributed.rank(), distributed.count())
    with evaluating(model):
        # Each rank takes every count-th batch. One without a batch of its own repeats the last, as the layers of a sharded model are
        # gathered by all ranks together.
        for turn in range(rank, -(-len(batches) // count) * count, count):
            index, length = batches[min(turn, len(batches) - 1)]
            ids = sequences.input_ids[index, :length].long().to(device)
            if sequences.choices is not None:
                answers, choices = sequences.answer_mask[index, :length].to(device), sequences.choices[index].to(device)
                part = run(model, _right_letter, ids, answers, choices)
            else:
                chosen = counted if sequences.answer_mask is None else sequences.answer_mask
                mask = sequences.text_mask(index) if chosen is None else chosen[index]
                score, positions = token_nats if sequences.answer_mask is None else _correct, sequences.position_ids(index)
                at = None if positions is None else positions[:, :length].to(device)
                part = run(model, score, ids, at, mask[:, :length].to(device))
            if turn < len(batches):
                parts.append(part.cpu())
                order.append(index)
    own = list(zip(parts, order, strict=True))
    found = own if count == 1 else [pair for of_rank in distributed.gather(own) for pair in of_rank]
    scores = torch.cat([part for part, _ in found])[torch.cat([index for _, index in found]).argsort()]
    scores = scores if repeats is None else scores[repeats]
    summary = accuracy if given.answer_mask is not None else _mean_nats
    result = summary(scores)
    if given.group is not None:
        result["groups"] = {
            name: summary(scores[given.group == index])
            for index, name in enumerate(given.group_names)
            if (given.group == index).any()
        }
    return result


def sequences_at_once(length: int) -> int:
    """Returns the default number of sequences of ``length`` tokens in a forward pass."""
    return max(1, min(512, POSITIONS // length))


def _batches(sequences: Sequences, size: int | None) -> Iterator[tuple[torch.Tensor, int]]:
    """Yields the indices of the sequences of each batch, and up to which token they are read: the last answer, if they have some."""
    lengths = torch.full((len(sequences),), sequences.length)
    if sequences.answer_mask is not None:  # argmax gives 0 where no token is an answer
        lengths -= sequences.answer_mask.flip(1).int().argmax(1)
    left = lengths.argsort(descending=True, stable=True)
    while len(left):
        longest = int(lengths[left[0]])
        count = size or sequences_at_once(longest)
        yield left[:count], longest
        left = left[count:]


def _correct(model: PreTrainedModel, ids: torch.Tensor, positions: torch.Tensor | None, mask: torch.Tensor) -> torch.Tensor:
    """Returns ``[batch]`` float64: 1 if every answer token is the most likely one, else 0."""
    hidden, labels, mask = _hidden(model, ids, positions), ids[:, 1:], mask[:, 1:]
    right = torch.ones_like(mask)
    right[mask] = most_likely(hidden[mask], head_of(model)) == labels[mask]
    return right.all(1).double()


def _right_letter(model: PreTrainedModel, ids: torch.Tensor, answers: torch.Tensor, choices: torch.Tensor) -> torch.Tensor:
    """Returns ``[batch]`` float64: 1 if the right letter is the likeliest (the first of equals), else 0; NaN is wrong."""
    at = answers.int().argmax(1)
    right = choices == ids.gather(1, at[:, None])
    logits = letter_logits(model, ids, at, choices)
    return (right.gather(1, logits.argmax(1, keepdim=True))[:, 0] & ~logits.isnan().any(1)).double()


def letter_logits(model: PreTrainedModel, ids: torch.Tensor, at: torch.Tensor, choices: torch.Tensor) -> torch.Tensor:
    """Returns ``[batch, k]`` float32: logits of the tokens ``choices`` for position ``at`` of each sequence; -inf for -1.

    Within a sequence they differ from log-likelihoods by a constant. Only the letters' vocabulary entries of the head are read.
    """
    hidden = _hidden(model, ids, None)[torch.arange(len(ids), device=ids.device), at - 1]
    return logits_of(hidden, head_of(model), choices.clamp_min(0)).masked_fill(choices < 0, -math.inf)


def token_nats(model: PreTrainedModel, ids: torch.Tensor, positions: torch.Tensor | None, mask: torch.Tensor) -> torch.Tensor:
    """Returns ``[batch, 2]`` float64: the cross-entropy in nats summed over a sequence's labels, and the number of labels."""
    labels, mask = ids[:, 1:], mask[:, 1:]
    summed = linear_cross_entropy(
        _hidden(model, ids, positions), head_of(model), labels.masked_fill(~mask, -100), reduction="none"
    )
    return torch.stack([summed.double().sum(1), mask.double().sum(1)], dim=1)


def _hidden(model: PreTrainedModel, ids: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    return hidden_states(model, ids[:, :-1], None, None if positions is None else positions[:, :-1])


def accuracy(scores: torch.Tensor) -> dict[str, Any]:
    """Returns the mean of scores ``[n]`` (each 0 or 1) with Wilson's 95 % interval."""
    n, p = len(scores), float(scores.mean())
    centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    return {"value": p, "low": max(0.0, min(p, centre - half)), "high": min(1.0, max(p, centre + half)), "n": n}


def _mean_nats(scores: torch.Tensor) -> dict[str, Any]:
    nats, labels = scores[:, 0], scores[:, 1]
    mean = nats.sum() / labels.sum()
    # Spread of a ratio estimator, because the sequences are independent draws and the tokens are not.
    spread = (nats - mean * labels).std(unbiased=len(scores) > 1) * math.sqrt(len(scores)) / labels.sum()
    low, value, high = (finite(float(x)) for x in (mean - _Z * spread, mean, mean + _Z * spread))
    return {"value": value, "low": low, "high": high, "n": len(scores)}
