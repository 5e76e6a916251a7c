"""Tokenises text, splits it into train, valid and test, and packs it into sequences with document boundaries."""

from __future__ import annotations

import hashlib
import itertools
import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from undo_core.data.encoding import encoded, fill_of, separator_of
from undo_core.data.reading import read_documents
from undo_core.data.sequences import Sequences


def pack(
    documents: Iterable[Sequence[int]],
    length: int,
    separator_id: int,
    pad_id: int,
    *,
    overflow: str = "carry",
    isolated: bool = False,
    beginning: str = "documents",
) -> Sequences:
    """Packs documents into sequences of ``length`` tokens, each document preceded by the separator.

    A separator is also the last label of the document before it. The last document gets one after it, if its sequence has room;
    that sequence is then padded. A sequence's first token is never a label, even if it is a separator.

    Args:
        documents: token ids of each document.
        length: tokens in a sequence, at least 2.
        separator_id: token before each document.
        pad_id: token that fills the last sequence.
        overflow: "carry" continues a document in the next sequence; "discard" drops what does not fit, as the published packing
            does (code of arXiv 2506.06278).
        isolated: whether the documents of a sequence must not attend to each other.
        beginning: "documents" puts the separator before each document only; "sequences" also before the part of a document that
            continues in the next sequence, so that every sequence begins with it.

    Memory: the sequences, and a few Python lists of the size of one document.

    Raises:
        ValueError: there are no documents, ``length`` is below 2, or ``overflow`` or ``beginning`` is unknown.
    """
    if length < 2:
        raise ValueError(f"length: got {length}, wanted an integer >= 2")
    if overflow not in ("carry", "discard"):
        raise ValueError(f"overflow: got {overflow!r}, wanted carry or discard")
    if beginning not in ("documents", "sequences"):
        raise ValueError(f"beginning: got {beginning!r}, wanted documents or sequences")
    sequences: list[torch.Tensor] = []
    starts: list[torch.Tensor] = []
    sequence: list[int] = []
    begins: list[int] = []  # positions in the sequence at which documents begin

    def finish() -> None:
        sequences.append(torch.tensor(sequence + [pad_id] * (length - len(sequence)), dtype=torch.int32))
        if isolated:
            starts.append(torch.zeros(length, dtype=torch.bool).index_fill_(0, torch.tensor(begins, dtype=torch.int64), True))
        sequence.clear()
        begins.clear()

    for document in documents:
        begins.append(len(sequence))
        whole = [separator_id, *document]
        at = 0  # an index instead of slicing the rest off, so that the time is linear in the document's length
        while at < len(whole):
            if beginning == "sequences" and at and not sequence:
                sequence.append(separator_id)
            space = length - len(sequence)
            sequence += whole[at : at + space]
            at = at + space if overflow == "carry" else len(whole)
            if len(sequence) == length:
                finish()
    last = length
    if sequence:
        begins.append(len(sequence))
        sequence.append(separator_id)
        last = len(sequence)
        finish()
    if not sequences:
        raise ValueError("documents: got none with a token, wanted at least one")
    lengths = torch.full((len(sequences),), length, dtype=torch.int32)
    lengths[-1] = last
    return Sequences(torch.stack(sequences), pad_id, lengths=lengths, starts=torch.stack(starts) if isolated else None)


def text_splits(
    tokenizer: PreTrainedTokenizerBase,
    *,
    retain: list[str] | dict[str, float],
    forget: list[str] | dict[str, float],
    length: int,
    valid_fraction: float,
    seed: int,
    tokens: int | None = None,
    distill: dict[str, Any] | None = None,
    isolated: bool = False,
    parse: bool = False,
    beginning: str = "documents",
) -> dict[str, Sequences]:
    """Returns the sequences of train, valid and test, each for retain and forget, by name (``train_retain``).

    A hash of the seed and a document's text decides its split, so that copies of a document fall into the same split. The
    sequences carry no answers: they are scored by cross-entropy.

    Args:
        tokenizer: its beginning-of-text token, or else its end-of-text token, stands before each document.
        retain: sources as for :func:`read_documents`; or a dict from source to its share of ``tokens``.
        forget: the same.
        length: tokens in a sequence.
        valid_fraction: share of the documents in each of valid and test.
        seed: seed of the split.
        tokens: number of tokens to take for each of retain and forget; None takes everything.
        distill: ``sources``, ``tokens`` and ``length`` of text to distill on; adds ``train_distill``, its training part.
        isolated: whether the documents of a sequence must not attend to each other.
        parse: whether control tokens that are written out in a document (``<|endoftext|>``) become those tokens; else they are
            text.
        beginning: where the beginning-of-text token stands, as in :func:`pack`.

    Memory: 4 bytes per token, twice.

    Raises:
        ValueError: a split got no document, because there are too few or ``valid_fraction`` is too small; or the tokenizer has
            no token for the beginning or end of a text.
    """
    separator, fill = separator_of(tokenizer), fill_of(tokenizer)

    def packed(documents: Iterable[Sequence[int]], length: int) -> Sequences:
        return pack(documents, length, separator, fill, isolated=isolated, beginning=beginning)

    splits: dict[str, Sequences] = {}
    for group, sources in (("retain", retain), ("forget", forget)):
        documents = _documents(tokenizer, sources, tokens, valid_fraction, seed, parse)
        for split, chosen in documents.items():
            if not chosen:
                total = sum(map(len, documents.values()))
                raise ValueError(
                    f"data.valid_fraction: got {valid_fraction}, with which none of {group}'s {total} documents fell into "
                    f"{split}"
                )
            splits[f"{split}_{group}"] = packed(chosen, length)
    if distill and distill["sources"]:
        documents = _documents(tokenizer, distill["sources"], distill["tokens"], valid_fraction, seed, parse)
        splits["train_distill"] = packed(documents["train"], distill["length"] or length)
    return splits


def split_bytes(sources: Iterable[str], valid_fraction: float, seed: int) -> dict[str, int]:
    """Returns the number of UTF-8 bytes of the documents in train, valid and test, as :func:`text_splits` divides all of them.

    It does not depend on a tokenizer, so it makes the losses of models with different tokenizers comparable.
    """
    sizes = {"train": 0, "valid": 0, "test": 0}
    for text in read_documents(sources):
        sizes[_split_of(text, seed, valid_fraction)] += len(text.encode())
    return sizes


def _documents(
    tokenizer: PreTrainedTokenizerBase,
    sources: list[str] | dict[str, float],
    tokens: int | None,
    valid_fraction: float,
    seed: int,
    parse: bool,
) -> dict[str, list[array]]:
    """Returns the token ids of each split's documents; reads no more documents than it takes.

    With shares, a source that is too short is repeated: its training documents are taken again until its share is reached.
    """
    found: dict[str, list[array]] = {"train": [], "valid": [], "test": []}
    parts: list[tuple[list[str], float]] = [(list(sources), math.inf if tokens is None else tokens)]
    if isinstance(sources, dict):
        parts = [([source], tokens * share / sum(sources.values())) for source, share in sorted(sources.items())]
    for part, left in parts:
        first = len(found["train"])
        for text, ids in _encoded(tokenizer, part, parse):
            if left <= 0:
                break
            found[_split_of(text, seed, valid_fraction)].append(ids)
            left -= len(ids) + 1
        if isinstance(sources, dict):
            for ids in itertools.cycle(found["train"][first:]):
                if left <= 0:
                    break
                found["train"].append(ids)
                left -= len(ids) + 1
    return found


def _encoded(tokenizer: PreTrainedTokenizerBase, sources: list[str], parse: bool) -> Iterator[tuple[str, array]]:
    """Yields every document with its token ids."""
    documents = read_documents(sources)
    while texts := list(itertools.islice(documents, 256)):
        for text, ids in zip(texts, encoded(tokenizer, texts, parse=parse), strict=True):
            if parse:  # packing adds the separator: drop one that the document has written out at its ends
                separator = separator_of(tokenizer)
                ids = ids[ids[:1] == [separator] :]
                ids = ids[: len(ids) - (ids[-1:] == [separator])]
            yield text, array("i", ids)


def _split_of(document: str, seed: int, valid_fraction: float) -> str:
    digest = hashlib.sha256(f"{seed}/{document}".encode()).digest()
    share = int.from_bytes(digest[:8], "little") / 2**64
    return "valid" if share < valid_fraction else "test" if share < 2 * valid_fraction else "train"
