"""Text: read from files or Hugging Face datasets, tokenised, split and packed into rows with document boundaries."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from undo_core.data.rows import Rows

HUB = "hf://"


def read_documents(sources: Iterable[str], *, field: str = "text") -> Iterator[str]:
    """The documents of every source, in order; empty ones are left out.

    Args:
        sources: ``.txt`` (a document a line), ``.jsonl`` (``field`` of every line), ``.parquet`` (column ``field``), or
            ``hf://name[:config[:split]][#field]``, streamed with Hugging Face ``datasets`` (the extra ``undo-core[data]``).
        field: of JSONL and Parquet.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: an unknown ending, a malformed line, a missing field, or a source without a document; names file and line.
        ImportError: an extra is missing; names the command that installs it.
    """
    for source in sources:
        empty = True
        for document in _read(str(source), field):
            if document.strip():
                empty = False
                yield document
        if empty:
            raise ValueError(f"{source}: got no document, wanted at least one line of text")


def _read(source: str, field: str) -> Iterator[str]:
    if source.startswith(HUB):
        yield from _read_hub(source, field)
        return
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"data: got {path}, which is not a file; wanted .txt, .jsonl, .parquet or {HUB}name[:config[:split]][#field]"
        )
    if path.suffix == ".txt":
        with open(path, encoding="utf-8") as file:
            yield from (line.rstrip("\n") for line in file)
    elif path.suffix == ".jsonl":
        yield from _read_jsonl(path, field)
    elif path.suffix == ".parquet":
        yield from _read_parquet(path, field)
    else:
        raise ValueError(f"{path}: got the ending {path.suffix!r}, wanted .txt, .jsonl or .parquet")


def _read_jsonl(path: Path, field: str) -> Iterator[str]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error.msg}); wanted one object a line") from None
            if not isinstance(record, dict) or not isinstance(record.get(field), str):
                raise ValueError(f"{path}, line {number}: got no text in the field {field!r}, wanted an object with that field")
            yield record[field]


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError(f"{path}: reading Parquet needs pyarrow; pip install 'undo-core[data]'") from None
    file = pyarrow.parquet.ParquetFile(path)
    if field not in file.schema_arrow.names:
        raise ValueError(f"{path}: got the columns {', '.join(file.schema_arrow.names)}, wanted one named {field!r}")
    for batch in file.iter_batches(columns=[field]):
        yield from (value or "" for value in batch.column(0).to_pylist())


def hub_records(source: str, split: str) -> Iterator[dict[str, Any]]:
    """The records of ``hf://name[:config[:split]]``, streamed; of ``split`` where the source names none.

    Raises:
        ImportError: without Hugging Face ``datasets``; names the command that installs it.
    """
    try:
        import datasets
    except ImportError:
        raise ImportError(f"{source}: reading it needs datasets; pip install 'undo-core[data]'") from None
    name, *rest = source.removeprefix(HUB).split(":")
    config, named = [*rest, "", ""][:2]
    yield from datasets.load_dataset(name, config or None, split=named or split, streaming=True)


def _read_hub(source: str, field: str) -> Iterator[str]:
    name, _, named = source.partition("#")
    field = named or field
    for record in hub_records(name, "train"):
        if not isinstance(record.get(field), str):
            raise ValueError(f"{source}: got the fields {', '.join(record)}, wanted one named {field!r} with text")
        yield record[field]


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
    code). The last row is padded. ``isolated`` documents do not attend to each other; the separator stays the last label of the document
    before it. Memory: the rows, and a few of Python's lists of one document.

    Raises:
        ValueError: no documents, a length under 2, or an unknown ``overflow``.
    """
    if length < 2:
        raise ValueError(f"length: got {length}, wanted an integer >= 2")
    if overflow not in ("carry", "discard"):
        raise ValueError(f"overflow: got {overflow!r}, wanted carry or discard")
    rows: list[torch.Tensor] = []
    row: list[int] = []
    for document in documents:
        left = [separator_id, *document]
        while left:
            space = length - len(row)
            row += left[:space]
            left = left[space:] if overflow == "carry" else []
            if len(row) == length:
                rows.append(torch.tensor(row, dtype=torch.int32))
                row = []
    if row:
        rows.append(torch.tensor(row + [pad_id] * (length - len(row)), dtype=torch.int32))
    if not rows:
        raise ValueError("documents: got none with a token, wanted at least one")
    return Rows(torch.stack(rows), pad_id, separator_id=separator_id if isolated else None)


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

    Memory: 4 bytes a token, twice.

    Raises:
        ValueError: a split got no document; there are too few, or ``valid_fraction`` is too small. A tokenizer without special tokens.
    """
    separator, pad = tokenizer.bos_token_id, tokenizer.pad_token_id
    separator = tokenizer.eos_token_id if separator is None else separator
    if separator is None or pad is None:
        raise ValueError("data.tokenizer: got one without a token for the beginning or end of a text, or for padding")

    def packed(documents: Iterable[Sequence[int]], length: int) -> Rows:
        return pack(documents, length, separator, pad, isolated=isolated)

    splits: dict[str, Rows] = {}
    for group, sources in (("retain", retain), ("forget", forget)):
        documents = _documents(tokenizer, sources, tokens, valid_fraction, seed)
        for split, encoded in documents.items():
            if not encoded:
                total = sum(map(len, documents.values()))
                raise ValueError(
                    f"data.valid_fraction: got {valid_fraction}, with which none of {group}'s {total} documents fell into {split}"
                )
            splits[f"{split}_{group}"] = packed(encoded, length)
    if distill and distill["sources"]:
        documents = _documents(tokenizer, distill["sources"], distill["tokens"], valid_fraction, seed)
        splits["train_distill"] = packed(documents["train"], distill["length"] or length)
    return splits


def _documents(
    tokenizer: PreTrainedTokenizerBase,
    sources: list[str] | dict[str, float],
    tokens: int | None,
    valid_fraction: float,
    seed: int,
) -> dict[str, list[array]]:
    """Token ids of the documents of each split; no more is read than is taken."""
    found: dict[str, list[array]] = {"train": [], "valid": [], "test": []}
    parts: list[tuple[list[str], float]] = [(list(sources), math.inf if tokens is None else tokens)]
    if isinstance(sources, dict):
        parts = [([source], tokens * share / sum(sources.values())) for source, share in sorted(sources.items())]
    for part, left in parts:
        first = len(found["train"])
        for text, ids in _encoded(tokenizer, part):
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


def _encoded(tokenizer: PreTrainedTokenizerBase, sources: list[str]) -> Iterator[tuple[str, array]]:
    """Every document and its token ids."""
    documents = read_documents(sources)
    while texts := list(itertools.islice(documents, 256)):
        for text, ids in zip(texts, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True):
            yield text, array("i", ids)


def _split_of(document: str, seed: int, valid_fraction: float) -> str:
    digest = hashlib.sha256(f"{seed}/{document}".encode()).digest()
    share = int.from_bytes(digest[:8], "little") / 2**64
    return "valid" if share < valid_fraction else "test" if share < 2 * valid_fraction else "train"
