"""Multiple choice as lm-eval scores it: the model's answer is the letter with the largest log-likelihood after the prompt.

The head runs only at the letters' positions, and letters that follow the same tokens share one forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from undo_core.data.encoding import encoded_with_beginning
from undo_core.data.questions import LETTERS, MultipleChoiceConfig, posed
from undo_core.distributed.head_ops import linear_cross_entropy
from undo_core.evaluation.metrics import POSITIONS, accuracy
from undo_core.models import evaluating, head_of, hidden_states, positions_of

Request = tuple[list[int], list[int]]  # tokens of the context, and tokens of the continuation to score


def multiple_choice(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: MultipleChoiceConfig) -> dict[str, Any]:
    """Returns the accuracy of ``model`` on multiple-choice questions.

    Returns:
        ``value``; ``low`` and ``high``, its 95 % interval (Wilson's); ``n``, the number of questions; ``truncated``, how many
        of them lost their beginning to fit into the model; and, if there are several subjects, ``groups`` with the accuracy for
        each.

    Raises:
        ValueError: a file holds no questions, or the tokenizer joins a letter with the prompt.
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
    right = torch.tensor(  # NaN, from a diverged model, counts as wrong
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
    """Returns :func:`encode_each` for a single continuation."""
    return encode_each(tokenizer, prompt, [continuation], parse=parse)[0]


def encode_each(
    tokenizer: PreTrainedTokenizerBase, prompt: str, continuations: Sequence[str], *, parse: bool = False
) -> list[Request]:
    """Returns, for each continuation, the tokens of ``prompt`` and those that the continuation adds.

    As in lm-eval, prompt and continuation are encoded together, and the added tokens are those after as many as the prompt has
    alone. White space at the prompt's end belongs to the continuation. The special tokens that the tokenizer puts before a text
    are kept; those that it puts after one are left out. For ``parse``, see :func:`undo_core.data.encoding.encoded`.

    Raises:
        ValueError: a continuation adds no token.
    """
    kept = prompt.rstrip()
    given, *wholes = encoded_with_beginning(tokenizer, [kept, *(prompt + text for text in continuations)], parse=parse)
    for text, whole in zip(continuations, wholes, strict=True):
        if len(whole) <= len(given):
            raise ValueError(
                f"tokenizer: got no token for {text!r} after the prompt, wanted a tokenizer that gives it tokens apart from "
                "the prompt"
            )
    return [(given, whole[len(given) :]) for whole in wholes]


@torch.no_grad()
def log_likelihoods(model: PreTrainedModel, requests: Sequence[Request], *, positions: int = POSITIONS) -> torch.Tensor:
    """Returns the log-probabilities of continuations, summed over their tokens: ``[requests]`` float64 on the CPU.

    A request that is too long for the model loses its beginning. Sequences of similar length run together, longest first.

    Args:
        model: the model; each module keeps its training or evaluation mode.
        requests: context and continuation of each request; at least one token in each.
        positions: largest number of tokens in a forward pass, padding included; a pass has at least one sequence.

    Memory: a forward pass of one batch and the hidden states of the continuations' positions; no logits beyond the op's
    workspace.

    Raises:
        ValueError: a request has an empty context or continuation, or a token outside the model's vocabulary.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    room = positions_of(model.config)
    sequences: dict[
        tuple[int, ...], list[tuple[int, list[int]]]
    ] = {}  # by tokens to read: requests and the tokens that they score
    for index, (given, asked) in enumerate(requests):
        if not given or not asked or not all(0 <= token < vocabulary for token in (*given, *asked)):
            raise ValueError(f"requests[{index}]: got {given}, {asked}, wanted one or more token ids each, below {vocabulary}")
        read = (*given, *asked)[:-1]
        read = read if room is None else read[-room:]
        sequences.setdefault(read, []).append((index, asked[-len(read) :]))
    device, head = next(model.parameters()).device, head_of(model)
    scores = torch.zeros(len(requests), dtype=torch.float64)
    ordered = sorted(sequences, key=len, reverse=True)
    while ordered:
        count = max(1, min(512, positions // len(ordered[0])))
        batch, ordered = ordered[:count], ordered[count:]
        ids = torch.zeros(len(batch), len(batch[0]), dtype=torch.int64)  # padding on the right is not attended to
        where = []  # sequence, position, token, request
        for sequence, read in enumerate(batch):
            ids[sequence, : len(read)] = torch.tensor(read)
            for index, asked in sequences[read]:
                where += [(sequence, len(read) - len(asked) + at, token, index) for at, token in enumerate(asked)]
        sequence, position, token, index = torch.tensor(where).T
        with evaluating(model):
            hidden = hidden_states(model, ids.to(device))[sequence.to(device), position.to(device)]
        nats = linear_cross_entropy(hidden, head, token.to(device), reduction="none")
        scores.index_add_(0, index, -nats.double().cpu())
    return scores
