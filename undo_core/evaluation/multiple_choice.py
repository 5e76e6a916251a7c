"""Multiple choice as lm-eval scores it: the letter with the largest log-likelihood after the prompt. The head runs at the letters'
positions alone, and letters that follow the same tokens share one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from undo_core import ops
from undo_core.data.encoding import encoded_with_beginning
from undo_core.data.questions import LETTERS, MultipleChoiceConfig, posed
from undo_core.evaluation.metrics import POSITIONS, accuracy
from undo_core.models import evaluating, head_of, hidden_states, positions_of

Request = tuple[list[int], list[int]]  # tokens that are given, and those whose likelihood is asked for


def multiple_choice(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: MultipleChoiceConfig) -> dict[str, Any]:
    """Accuracy of ``model`` on multiple-choice questions.

    Returns:
        ``value``, ``low`` and ``high`` (95 %, Wilson's interval) and ``n`` questions, ``truncated``, the number of questions whose
        beginning does not fit into the model, and ``groups`` with the same for each subject where there are several.

    Raises:
        ValueError: a file that holds no questions, or a tokenizer that does not keep a letter apart from the prompt.
        FileNotFoundError: a file is missing.
    """
    questions, texts = posed(config)
    requests, truncated = [], 0
    room = positions_of(model.config)
    for question, text in zip(questions, texts, strict=True):
        letters = [f" {letter}" for letter in LETTERS[: len(question.choices)]]
        own = encode_each(tokenizer, text, letters, parse=config.special_tokens == "parse")
        if len({tuple(asked) for _, asked in own}) < len(own):
            raise ValueError(f"tokenizer: got the tokens {own[0][1]} for more than one letter, wanted different ones for each")
        truncated += room is not None and any(len(given) + len(asked) - 1 > room for given, asked in own)
        requests += own
    scores = log_likelihoods(model, requests).split([len(question.choices) for question in questions])
    right = torch.tensor(  # NaN, of a diverged model, is wrong
        [float(int(part.argmax()) == q.answer and not part.isnan().any()) for part, q in zip(scores, questions, strict=True)],
        dtype=torch.float64,
    )
    result = {**accuracy(right), "truncated": truncated}
    subjects = dict.fromkeys(question.subject for question in questions)
    if len(subjects) > 1:
        of = {name: torch.tensor([question.subject == name for question in questions]) for name in subjects}
        result["groups"] = {name: accuracy(right[mask]) for name, mask in of.items()}
    return result


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, continuation: str, *, parse: bool = False) -> Request:
    """:func:`encode_each` of one continuation."""
    return encode_each(tokenizer, prompt, [continuation], parse=parse)[0]


def encode_each(
    tokenizer: PreTrainedTokenizerBase, prompt: str, continuations: Sequence[str], *, parse: bool = False
) -> list[Request]:
    """Tokens of ``prompt``, and those that each continuation adds to it: what is left of the whole after as many as the prompt has, as in
    lm-eval, and white space at the prompt's end belongs to what follows. The tokenizer's beginning of text is there where it puts one by
    itself; its end of text is not: the text goes on. ``parse``: see :func:`undo_core.data.encoding.encoded`.

    Raises:
        ValueError: a continuation adds no token.
    """
    kept = prompt.rstrip()
    given, *wholes = encoded_with_beginning(tokenizer, [kept, *(prompt + text for text in continuations)], parse=parse)
    for text, whole in zip(continuations, wholes, strict=True):
        if len(whole) <= len(given):
            raise ValueError(f"tokenizer: got no token for {text!r} after the prompt, wanted one that keeps it apart")
    return [(given, whole[len(given) :]) for whole in wholes]


@torch.no_grad()
def log_likelihoods(model: PreTrainedModel, requests: Sequence[Request], *, positions: int = POSITIONS) -> torch.Tensor:
    """Log-probabilities of continuations, summed over their tokens: ``[requests]`` float64 on the CPU.

    What does not fit into the model is left out at the beginning. Rows of like lengths run together, longest first.

    Args:
        model: left in the mode it was in.
        requests: tokens that are given, and those whose likelihood is asked for; at least one of each.
        positions: in a forward pass, padding included; one row at least.

    Memory: a forward pass of one batch and the hidden states of the continuations' positions; no logits beyond the op's workspace.

    Raises:
        ValueError: a request without a token, or with one that the model's vocabulary has not.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    room = positions_of(model.config)
    rows: dict[tuple[int, ...], list[tuple[int, list[int]]]] = {}  # what is read, and who asks for what after it
    for index, (given, asked) in enumerate(requests):
        if not given or not asked or not all(0 <= token < vocabulary for token in (*given, *asked)):
            raise ValueError(f"requests[{index}]: got {given}, {asked}, wanted one or more token ids each, below {vocabulary}")
        read = (*given, *asked)[:-1]
        read = read if room is None else read[-room:]
        rows.setdefault(read, []).append((index, asked[-len(read) :]))
    device, head = next(model.parameters()).device, head_of(model)
    scores = torch.zeros(len(requests), dtype=torch.float64)
    ordered = sorted(rows, key=len, reverse=True)
    while ordered:
        count = max(1, min(512, positions // len(ordered[0])))
        batch, ordered = ordered[:count], ordered[count:]
        ids = torch.zeros(len(batch), len(batch[0]), dtype=torch.int64)  # padding on the right is not attended to
        where = []  # row, position, token, request
        for row, read in enumerate(batch):
            ids[row, : len(read)] = torch.tensor(read)
            for index, asked in rows[read]:
                where += [(row, len(read) - len(asked) + at, token, index) for at, token in enumerate(asked)]
        row, position, token, index = torch.tensor(where).T
        with evaluating(model):
            hidden = hidden_states(model, ids.to(device))[row.to(device), position.to(device)]
        nats = ops.linear_cross_entropy(hidden, head.weight, token.to(device), reduction="none", **head.options())
        scores.index_add_(0, index, -nats.double().cpu())
    return scores
