"""Converts multiple-choice questions to token sequences, which :func:`undo_core.evaluate` scores."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from undo_core.data.encoding import encoded_with_beginning, fill_of
from undo_core.data.questions import LETTERS, MultipleChoiceConfig, Question, posed
from undo_core.data.sequences import Sequences


def question_splits(
    tokenizer: PreTrainedTokenizerBase,
    chosen: Mapping[str, MultipleChoiceConfig],
    *,
    valid_fraction: float,
    seed: int,
    positions: int | None,
) -> tuple[dict[str, Sequences], dict[str, int]]:
    """Returns the sequences of valid and test for each entry of ``chosen``, and how many questions of each were truncated.

    A hash of the seed, a question's text and its choices decides its split. Copies with the same choices in any order therefore
    fall into the same split, and the split does not depend on other questions. A sequence has the tokens that lm-eval gives a
    model, and then the right letter's token.

    Args:
        tokenizer: the special tokens that it puts before a text stand before the prompt. Those that it puts after a text are
            left out, since the answer follows.
        chosen: the questions by name, retain and forget.
        valid_fraction: share of the questions in valid; the others are test.
        seed: seed of the split.
        positions: number of the model's positions; None if it has no limit. A longer prompt loses its beginning.

    Memory: for each question, 5 bytes per token of the longest question.

    Raises:
        ValueError: a split has no question, the tokenizer does not give exactly one token for a letter, or a file is malformed.
        FileNotFoundError: a file is missing.
    """
    splits: dict[str, Sequences] = {}
    cut: dict[str, int] = {}
    for name, config in chosen.items():
        parts: dict[str, list[tuple[Question, str]]] = {"valid": [], "test": []}
        for question, text in zip(*posed(config), strict=True):
            parts["valid" if _share(question, seed) < valid_fraction else "test"].append((question, text))
        for split, part in parts.items():
            if not part:
                raise ValueError(
                    f"data.questions.valid_fraction: got {valid_fraction}, with which none of {name}'s "
                    f"{sum(map(len, parts.values()))} questions fell into {split}"
                )
            splits[f"{split}_{name}"], cut[f"{split}_{name}"] = _sequences(
                tokenizer, part, positions, config.special_tokens == "parse"
            )
    return splits, cut


def _sequences(
    tokenizer: PreTrainedTokenizerBase, posed: Sequence[tuple[Question, str]], positions: int | None, parse: bool
) -> tuple[Sequences, int]:
    asked = [_encode(tokenizer, text, len(question.choices), parse) for question, text in posed]
    cut = sum(positions is not None and len(given) > positions for given, _ in asked)
    # The last token, the right letter, is only a label: it takes no position of the model.
    prompts = [given if positions is None else given[-positions:] for given, _ in asked]
    lengths = torch.tensor([len(given) + 1 for given in prompts], dtype=torch.int32)
    ids = torch.full((len(posed), int(lengths.max())), fill_of(tokenizer), dtype=torch.int32)
    answers = torch.zeros(ids.shape, dtype=torch.bool)
    choices = torch.full((len(posed), max(len(letters) for _, letters in asked)), -1, dtype=torch.int32)
    for sequence, ((question, _), given, (_, letters)) in enumerate(zip(posed, prompts, asked, strict=True)):
        ids[sequence, : len(given) + 1] = torch.tensor([*given, letters[question.answer]], dtype=torch.int32)
        answers[sequence, len(given)] = True
        choices[sequence, : len(letters)] = torch.tensor(letters, dtype=torch.int32)
    subjects = sorted({question.subject for question, _ in posed})
    group = torch.tensor([subjects.index(question.subject) for question, _ in posed], dtype=torch.int16)
    grouped: dict[str, Any] = {"group": group, "group_names": tuple(subjects)} if len(subjects) > 1 else {}
    return Sequences(ids, fill_of(tokenizer), answers, choices=choices, lengths=lengths, **grouped), cut


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, count: int, parse: bool) -> tuple[list[int], list[int]]:
    """Returns the tokens of the prompt, and the one token that each of the first ``count`` letters adds to it."""
    texts = [prompt, *(f"{prompt} {letter}" for letter in LETTERS[:count])]
    given, *whole = encoded_with_beginning(tokenizer, texts, parse=parse)
    added = [ids[len(given) :] for ids in whole]
    joined = next((ids for ids in whole if ids[: len(given)] != given), None)
    if joined is not None:
        raise ValueError(
            f"data.tokenizer: got the tokens {joined[-3:]} at the end of a prompt with its letter and {given[-2:]} at the end "
            "of the prompt alone, wanted a tokenizer that keeps a letter apart from what stands before it"
        )
    if any(len(tokens) != 1 for tokens in added) or len({tokens[0] for tokens in added}) < count:
        letter, tokens = next(
            ((letter, tokens) for letter, tokens in zip(LETTERS, added, strict=False) if len(tokens) != 1),
            (LETTERS[0], added[0]),
        )
        raise ValueError(
            f"data.tokenizer: got the tokens {tokens} for {f' {letter}'!r} after a prompt, wanted a tokenizer with one token "
            "of its own for each letter, as data.questions compares them; `undo evaluate --multiple-choice` takes any"
        )
    return given, [tokens[0] for tokens in added]


def _share(question: Question, seed: int) -> float:
    """Returns a number in [0, 1), a hash of the question that is uniform over questions."""
    text = "\n".join([question.question.strip(), *sorted(choice.strip() for choice in question.choices)])
    digest = hashlib.sha256(f"{seed}/{text}".encode()).digest()
    return int.from_bytes(digest[:8], "little") / 2**64
