"""Evaluation: exact match of greedy answers, the likeliest letter of multiple choice, or cross-entropy on text, each with a 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from undo_core import ops
from undo_core.data.limits import limits_of
from undo_core.data.rows import Rows
from undo_core.models import Head, evaluating, head_of, hidden_states

_Z = 1.959964  # 97.5 % point of the normal law
POSITIONS = 16_384  # in a forward pass by default, and 512 rows at most
LOGITS = 1 << 25  # (answer token, vocabulary row) pairs at once


@torch.no_grad()
def evaluate(
    model: PreTrainedModel, rows: Rows, *, batch_size: int | None = None, counted: torch.Tensor | None = None
) -> dict[str, Any]:
    """Score ``model`` on ``rows``: accuracy where they have answers, else mean cross-entropy in nats per token.

    Accuracy is the exact match of the greedy answer, terminator included. It is computed in one forward pass over the
    reference text: greedy decoding gives the reference answer exactly when the most likely token is right at every answer
    position given the tokens before it, which are then the ones that decoding itself produced. Of rows with choices it is the share
    whose right letter is the likeliest of the letters. They run sorted by length, each batch cut to its longest row.

    Args:
        model: left in the mode it was in.
        rows: ``[n, length]`` token rows.
        batch_size: rows in a forward pass; None for 512, or fewer where those would be more than 16,384 positions.
        counted: ``[n, length]`` bool, the tokens whose cross-entropy counts; None for all but padding. Rows with answers need none.

    Returns:
        ``value``, ``low`` and ``high`` (95 %: Wilson's interval for accuracy, normal over rows for cross-entropy), ``n``
        rows, and ``groups`` with the same for each group of rows. The cross-entropy of a diverged model is NaN-free: it is
        reported as the largest finite float32.

    Memory: a forward pass of one batch; logits of 2**25 (answer token, vocabulary row) pairs at most.

    Raises:
        ValueError: the rows have a token that the model's vocabulary has not, or more tokens than it has positions.
    """
    limits_of(model).check_rows(rows, "rows")
    device = next(model.parameters()).device
    parts, order = [], []
    with evaluating(model):
        for index, length in _batches(rows, batch_size):
            ids = rows.input_ids[index, :length].long().to(device)
            if rows.choices is not None:
                part = _right_letter(model, ids, rows.answer_mask[index, :length].to(device), rows.choices[index].to(device))
            else:
                chosen = counted if rows.answer_mask is None else rows.answer_mask
                mask = rows.text_mask(index) if chosen is None else chosen[index]
                score, positions = token_nats if rows.answer_mask is None else _correct, rows.position_ids(index)
                part = score(model, ids, None if positions is None else positions.to(device), mask.to(device))
            parts.append(part.cpu())
            order.append(index)
    scores = torch.cat(parts)[torch.cat(order).argsort()]
    summary = accuracy if rows.answer_mask is not None else _mean_nats
    result = summary(scores)
    if rows.group is not None:
        result["groups"] = {
            name: summary(scores[rows.group == index])
            for index, name in enumerate(rows.group_names)
            if (rows.group == index).any()
        }
    return result


def rows_at_once(length: int) -> int:
    """Rows of ``length`` tokens in a forward pass."""
    return max(1, min(512, POSITIONS // length))


def _batches(rows: Rows, size: int | None) -> Iterator[tuple[torch.Tensor, int]]:
    """Indices of the rows that run together, and how many of their columns."""
    lengths = torch.full((len(rows),), rows.length) if rows.choices is None else rows.answer_mask.int().argmax(1) + 1
    left = lengths.argsort(descending=True, stable=True)
    while len(left):
        longest = int(lengths[left[0]])
        count = size or rows_at_once(longest)
        yield left[:count], longest
        left = left[count:]


def _correct(model: PreTrainedModel, ids: torch.Tensor, positions: torch.Tensor | None, mask: torch.Tensor) -> torch.Tensor:
    """``[batch]`` float64, 1 where every answer token is the most likely one."""
    hidden, labels, mask = _hidden(model, ids, positions), ids[:, 1:], mask[:, 1:]
    right = torch.ones_like(mask)
    right[mask] = most_likely(hidden[mask], head_of(model)) == labels[mask]
    return right.all(1).double()


def _right_letter(model: PreTrainedModel, ids: torch.Tensor, answers: torch.Tensor, choices: torch.Tensor) -> torch.Tensor:
    """``[batch]`` float64, 1 where no letter is likelier than the right one; of equals the first counts, and NaN is wrong."""
    at = answers.int().argmax(1)
    right = choices == ids.gather(1, at[:, None])
    logits = letter_logits(model, ids, at, choices)
    return (right.gather(1, logits.argmax(1, keepdim=True))[:, 0] & ~logits.isnan().any(1)).double()


def letter_logits(model: PreTrainedModel, ids: torch.Tensor, at: torch.Tensor, choices: torch.Tensor) -> torch.Tensor:
    """``[batch, k]`` float32: logits of the tokens ``choices`` at the positions ``at`` ``[batch]`` of the rows; -inf for a choice of -1.

    They differ from log-likelihoods by the same for all letters of a row. Of the head, only the letters' rows are read.
    """
    hidden = _hidden(model, ids, None)[torch.arange(len(ids), device=ids.device), at - 1]
    head, letters = head_of(model), choices.clamp_min(0)
    bias = None if head.bias is None else head.bias[letters].float()
    products = torch.bmm(head.weight[letters].float(), hidden.float()[:, :, None])[:, :, 0]
    return _logits(products, bias, head).masked_fill(choices < 0, -math.inf)


def most_likely(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    """Tokens ``[n]`` of the largest logits, from hidden states ``[n, d]``."""
    weight, bias = head.weight.float().T, None if head.bias is None else head.bias.float()
    tokens = []
    for part in hidden.split(max(1, LOGITS // weight.shape[1])):
        tokens.append(_logits(part.float() @ weight, bias, head).argmax(-1))
    return torch.cat(tokens)


def _logits(logits: torch.Tensor, bias: torch.Tensor | None, head: Head) -> torch.Tensor:
    """Of the head's bare products. A softcap and a positive scale keep their order, but ties can arise at the cap: it is applied."""
    if bias is not None:
        logits = logits + bias
    logits = logits * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def token_nats(model: PreTrainedModel, ids: torch.Tensor, positions: torch.Tensor | None, mask: torch.Tensor) -> torch.Tensor:
    """``[batch, 2]`` float64: cross-entropy summed over the row's labels, and their number."""
    labels, mask = ids[:, 1:], mask[:, 1:]
    head = head_of(model)
    summed = ops.linear_cross_entropy(
        _hidden(model, ids, positions), head.weight, labels.masked_fill(~mask, -100), reduction="none", **head.options()
    )
    return torch.stack([summed.double().sum(1), mask.double().sum(1)], dim=1)


def _hidden(model: PreTrainedModel, ids: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    return hidden_states(model, ids[:, :-1], None, None if positions is None else positions[:, :-1])


def accuracy(scores: torch.Tensor) -> dict[str, Any]:
    """Mean of scores ``[n]`` of 0 and 1, with Wilson's 95 % interval."""
    n, p = len(scores), float(scores.mean())
    centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2))
    return {"value": p, "low": max(0.0, min(p, centre - half)), "high": min(1.0, max(p, centre + half)), "n": n}


def _mean_nats(scores: torch.Tensor) -> dict[str, Any]:
    nats, labels = scores[:, 0], scores[:, 1]
    mean = nats.sum() / labels.sum()
    # Ratio estimator: rows are the independent draws, not tokens.
    spread = (nats - mean * labels).std(unbiased=len(scores) > 1) * math.sqrt(len(scores)) / labels.sum()
    low, value, high = (
        float(torch.nan_to_num(x, nan=3.4e38, posinf=3.4e38)) for x in (mean - _Z * spread, mean, mean + _Z * spread)
    )
    return {"value": value, "low": low, "high": high, "n": len(scores)}
