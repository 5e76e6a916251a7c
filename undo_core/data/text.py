"""Text: tokenised, split and packed into rows with document boundaries."""

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
from undo_core.data.rows import Rows


def pack(
    documents: Iterable[Sequence[int]],
    length: int,
    separator_id: int,
    pad_id: int,
    *,
    overflow: str = "carry",
    isolated: bool = False,
) -> Rows:
    """Token ids of documents as rows of ``length``, each document preceded by the separator.

    What overflows a row goes into the next one; ``overflow="discard"`` drops it, as the published packing does (arXiv 2506.06278's
    code). The separator is the last label of the document before it; the last document has one after it too, where its row has room.
    That row is padded. A separator that falls on a row's first token is no label, as no token is that stands there. ``isolated``
    documents do not attend to each other. Memory: the rows, and a few of Python's lists of one document.

    Raises:
        ValueError: no documents, a length under 2, or an unknown ``overflow``.
    """
    if length < 2:
        raise ValueError(f"length: got {length}, wanted an integer >= 2")
    if overflow not in ("carry", "discard"):
        raise ValueError(f"overflow: got {overflow!r}, wanted carry or discard")
    rows: list[torch.Tensor] = []
    starts: list[torch.Tensor] = []
    row: list[int] = []
    begins: list[int] = []  # where documents begin in the row

    def finish() -> None:
        rows.append(torch.tensor(row + [pad_id] * (length - len(row)), dtype=torch.int32))
        if isolated:
            starts.append(torch.zeros(length, dtype=torch.bool).index_fill_(0, torch.tensor(begins, dtype=torch.int64), True))
        row.clear()
        begins.clear()

    for document in documents:
        begins.append(len(row))
        whole = [separator_id, *document]
        at = 0  # by position, so that the time is linear in a document of any length
        while at < len(whole):
            space = length - len(row)
            row += whole[at : at + space]
            at = at + space if overflow == "carry" else len(whole)
            if len(row) == length:
                finish()
    last = length
    if row:
        begins.append(len(row))
        row.append(separator_id)
        last = len(row)
        finish()
    if not rows:
        raise ValueError("documents: got none with a token, wanted at least one")
    lengths = torch.full((len(rows),), length, dtype=torch.int32)
    lengths[-1] = last
    return Rows(torch.stack(rows), pad_id, lengths=lengths, starts=torch.stack(starts) if isolated else None)


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
) -> dict[str, Rows]:
    """Rows of train, valid and test, each for retain and forget; a document's split is a hash of the seed and its text.

    Copies of one document thus fall into one split. The rows carry no answers: they are scored by cross-entropy.

    Args:
        tokenizer: a document is preceded by its beginning-of-text token, or its end-of-text token where it has no such.
        retain: sources of :func:`read_documents`, or their shares of ``tokens``.
        forget: the same.
        length: tokens in a row.
        valid_fraction: share of the documents in each of valid and test.
        seed: of the split.
        tokens: to take of each of retain and forget.
        distill: ``sources``, ``tokens`` and ``length`` of text to distill on, of which the training part is kept.
        isolated: documents of a row do not attend to each other.
        parse: control tokens that are written out in a document (``<|endoftext|>``) become those tokens; otherwise they are text.

    Memory: 4 bytes a token, twice.

    Raises:
        ValueError: a split got no document; there are too few, or ``valid_fraction`` is too small. A tokenizer without special tokens.
    """
    separator, fill = separator_of(tokenizer), fill_of(tokenizer)

    def packed(documents: Iterable[Sequence[int]], length: int) -> Rows:
        return pack(documents, length, separator, fill, isolated=isolated)

    splits: dict[str, Rows] = {}
    for group, sources in (("retain", retain), ("forget", forget)):
        documents = _documents(tokenizer, sources, tokens, valid_fraction, seed, parse)
        for split, chosen in documents.items():
            if not chosen:
                total = sum(map(len, documents.values()))
                raise ValueError(
                    f"data.valid_fraction: got {valid_fraction}, with which none of {group}'s {total} documents fell into {split}"
                )
            splits[f"{split}_{group}"] = packed(chosen, length)
    if distill and distill["sources"]:
        documents = _documents(tokenizer, distill["sources"], distill["tokens"], valid_fraction, seed, parse)
        splits["train_distill"] = packed(documents["train"], distill["length"] or length)
    return splits


def _documents(
    tokenizer: PreTrainedTokenizerBase,
    sources: list[str] | dict[str, float],
    tokens: int | None,
    valid_fraction: float,
    seed: int,
    parse: bool,
) -> dict[str, list[array]]:
    """Token ids of the documents of each split; no more is read than is taken."""
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
    """Every document and its token ids."""
    documents = read_documents(sources)
    while texts := list(itertools.islice(documents, 256)):
        for text, ids in zip(texts, encoded(tokenizer, texts, parse=parse), strict=True):
            if parse:  # what stands between documents stands there once, also where a document brings it along
                separator = separator_of(tokenizer)
                ids = ids[ids[:1] == [separator] :]
                ids = ids[: len(ids) - (ids[-1:] == [separator])]
            yield text, array("i", ids)


def _split_of(document: str, seed: int, valid_fraction: float) -> str:
    digest = hashlib.sha256(f"{seed}/{document}".encode()).digest()
    share = int.from_bytes(digest[:8], "little") / 2**64
    return "valid" if share < valid_fraction else "test" if share < 2 * valid_fraction else "train"
