"""Few-shot prompting: solved examples of the forgotten capability are put before each prompt; nothing is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from undo_core.data.sequences import Sequences


def few_shot(
    sequences: Sequences,
    examples: Sequences,
    shots: int,
    *,
    seed: int,
    positions: int | None,
    between: Sequence[int] = (),
    lead: int | Sequence[int] | None = None,
) -> tuple[Sequences, torch.Tensor]:
    """Puts ``shots`` sequences of ``examples`` before each sequence, one after another as in a packed sequence.

    The examples of a sequence differ from each other and from the sequence itself, whose answer could otherwise be copied. If
    ``between`` is empty and an example ends with the token that the next part begins with (a separator), that token is kept
    once. The result is one text without document boundaries, as isolated documents would not attend to the examples.

    Args:
        sequences: sequences to score.
        examples: solved examples; padded on the right, like ``sequences``.
        shots: number of examples before each sequence.
        seed: seed of the draw.
        positions: largest number of positions of the model; None without a limit.
        between: token ids to insert after each example.
        lead: token or tokens that begin every sequence and are kept only once, before the first example; None for none.

    Returns:
        The longer sequences, and ``[n, length]`` bool, True for the tokens of the sequence itself that are labels without the
        examples too. Pass it to :func:`undo_core.evaluate` as ``counted``.

    Raises:
        ValueError: too few different examples, or sequences longer than ``positions``.
    """
    begin = [] if lead is None else [lead] if isinstance(lead, int) else list(lead)
    known = sorted(set(map(tuple, _texts(examples))))
    generator = torch.Generator().manual_seed(seed)
    prompted: list[tuple[list[int], int]] = []  # tokens, and the index where the sequence itself begins
    for own in _texts(sequences):
        drawn = [known[index] for index in torch.randperm(len(known), generator=generator)[: shots + 1].tolist()]
        before = [example for example in drawn if example != tuple(own)][:shots]
        if len(before) < shots:
            raise ValueError(
                f"shots: got {shots}, wanted at most the {len(known) - 1} different examples beside the sequence itself"
            )
        tokens: list[int] = []
        for part in (*before, own):
            if tokens and not between and tokens[-1] == part[0]:
                tokens.pop()
            begun = len(begin) if tokens and list(part[: len(begin)]) == begin else 0
            start = len(tokens) - begun  # index of the sequence's first token, or where it would be without the shared lead
            tokens += part[begun:]
            if part is not own:
                tokens += between
        prompted.append((tokens, start))
    length = max(len(tokens) for tokens, _ in prompted)
    if positions is not None and length - 1 > positions:  # the last token is only a label
        fit = positions // -(-(length - 1) // (shots + 1)) - 1
        raise ValueError(
            f"shots: got {shots}, whose sequences take {length - 1} positions of the model's {positions}; wanted about "
            f"{max(fit, 0)} at most"
        )
    ids = torch.full((len(sequences), length), sequences.pad_id, dtype=torch.int32)
    counted = torch.zeros(len(sequences), length, dtype=torch.bool)
    answers = None if sequences.answer_mask is None else torch.zeros(len(sequences), length, dtype=torch.bool)
    for index, (tokens, start) in enumerate(prompted):
        ids[index, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
        counted[index, start + 1 : len(tokens)] = True
        if answers is not None:
            answers[index, start : len(tokens)] = sequences.answer_mask[index, : len(tokens) - start]
    lengths = torch.tensor([len(tokens) for tokens, _ in prompted], dtype=torch.int32)
    return dataclasses.replace(sequences, input_ids=ids, answer_mask=answers, lengths=lengths, starts=None), counted


def _texts(sequences: Sequences) -> list[list[int]]:
    """Token lists of the sequences without the padding on the right."""
    return [
        sequence[: max(length, 1)]
        for sequence, length in zip(sequences.input_ids.tolist(), sequences.lengths.tolist(), strict=True)
    ]
