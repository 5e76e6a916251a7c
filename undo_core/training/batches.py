"""Batches: what one training step reads from each of its sources."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import repeat
from typing import Any

import torch

from undo_core.data.rows import Rows
from undo_core.files import hash_json


@dataclass(frozen=True)
class Batch:
    """Token ids and which of them count as labels.

    Attributes:
        input_ids: ``[batch, length]`` int64.
        mask: ``[batch, length]`` bool, True where the token is text and counts; the first column has no prediction, so it is no label.
        attention_mask: ``[batch, length]`` or None. Rows padded on the right need none in a causal model.
        position_ids: ``[batch, length]`` int64 or None; where they start again, a document begins that does not attend to what stands
            before it. Not with an attention mask, beside which transformers would let it attend.
        reference: ``[batch, length - 1]`` float, what a loss needs to know of another model; of an unlearning method's forget batches.
        whole: of a micro-batch, the batch that it is a part of.
        rows: ``[batch]`` int64 indices into the :class:`Rows` that the batch was drawn from, on the CPU; None of other data.
    """

    input_ids: torch.Tensor
    mask: torch.Tensor
    attention_mask: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    reference: torch.Tensor | None = None
    whole: Batch | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.position_ids is None:
            return
        if self.attention_mask is not None:
            raise ValueError(
                "position_ids: got them with an attention_mask, wanted one of the two; rows padded on the right need no mask"
            )
        if self.position_ids.shape != self.input_ids.shape or self.position_ids.is_floating_point():
            raise ValueError(
                f"position_ids: got shape {tuple(self.position_ids.shape)} and {self.position_ids.dtype}, wanted integers of the shape "
                f"of input_ids, {tuple(self.input_ids.shape)}"
            )

    def digest(self) -> str:
        """SHA-256 of every column."""
        columns = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "whole"}
        held = {name: column.cpu() for name, column in columns.items() if column is not None}
        parts = {n: [str(c.dtype), list(c.shape), hashlib.sha256(c.contiguous().numpy()).hexdigest()] for n, c in held.items()}
        return hash_json(parts)

    @property
    def counted(self) -> int:
        """Number of labels."""
        return int(self.mask[:, 1:].sum())

    def to(self, device: torch.device) -> Batch:
        columns = (self.attention_mask, self.position_ids, self.reference)
        attention, positions, reference = (None if column is None else column.to(device) for column in columns)
        return Batch(self.input_ids.to(device), self.mask.to(device), attention, self.rows, positions, reference)

    def split(self, size: int) -> list[Batch]:
        """Micro-batches of at most ``size`` rows."""
        columns = (self.input_ids, self.mask, self.attention_mask, self.rows, self.position_ids, self.reference)
        parts = [repeat(None) if column is None else column.split(size) for column in columns]
        return [Batch(*part, whole=self) for part in zip(*parts, strict=False)]

    @property
    def inputs(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """What a model reads, ``[batch, length]`` each: the ids, the attention mask and the positions."""
        return self.input_ids, self.attention_mask, self.position_ids

    def shifted(self) -> tuple[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor, torch.Tensor]:
        """Inputs, labels and label mask, each ``[batch, length - 1]``: position t predicts token t + 1."""
        ids, *rest = (None if column is None else column[:, :-1] for column in self.inputs)
        return (ids, *rest), self.input_ids[:, 1:], self.mask[:, 1:]


Source = Callable[[int], Batch]  # the batch of a step; a pure function where a run must be resumable


@dataclass(frozen=True)
class RowsSource:
    """Batches of ``size`` rows in the order that ``seed`` gives; a pure function of the step."""

    rows: Rows
    size: int
    seed: int

    def __call__(self, step: int) -> Batch:
        index = self.rows.order(step, self.size, self.seed)
        ids = self.rows.input_ids[index].long()
        return Batch(ids, ids != self.rows.pad_id, rows=index, position_ids=self.rows.position_ids(ids))

    def identity(self) -> dict[str, Any]:
        """What decides every batch, as JSON values."""
        return {"rows": self.rows.digest(), "size": self.size, "seed": self.seed}


@dataclass(frozen=True)
class ReadSource:
    """The batches of all steps of ``source``, read already; what it says of itself is said of them."""

    source: Source
    batches: list[Batch]

    def __call__(self, step: int) -> Batch:
        return self.batches[step]

    def identity(self) -> dict[str, Any] | None:
        """As of ``source``."""
        return identity_of(self.source)


@dataclass(frozen=True)
class BatchesSource:
    """The batches of a sequence in turn, again from the first after the last; a pure function of the step."""

    batches: Sequence[Any]
    name: str

    def __call__(self, step: int) -> Batch:
        return as_batch(self.batches[step % len(self.batches)], self.name)

    def identity(self) -> dict[str, Any]:
        """Digest of every batch."""
        return {"batches": hash_json([as_batch(item, self.name).digest() for item in self.batches])}


@dataclass
class StreamSource:
    """The batches of an iterable, which is started again when it ends; a resumed run reads past those that were used before."""

    data: Iterable[Any]
    name: str
    position: int = 0
    _stream: Iterator[Any] | None = None

    def __call__(self, step: int) -> Batch:
        if self._stream is None or step < self.position:
            self._stream, self.position = _endless(self.data, self.name), 0
        for _ in range(step - self.position):
            next(self._stream)
        self.position = step + 1
        return as_batch(next(self._stream), self.name)

    def identity(self) -> None:
        """Unknown: what an iterable yields is known only once it is read."""


def identity_of(source: Source) -> dict[str, Any] | None:
    """What decides a source's batches, as JSON values: of rows and sequences all of them, of a function the batch of step 0.

    None for an iterable, which cannot tell.
    """
    if hasattr(source, "identity"):
        return source.identity()
    return {"first": source(0).digest()}


def rows_source(rows: Rows, size: int, seed: int) -> Source:
    """The :class:`RowsSource` of ``rows``."""
    return RowsSource(rows, size, seed)


def as_source(data: Rows | Source | Iterable[Any], *, size: int, seed: int, name: str) -> Source:
    """A source from token rows, from a function of the step, or from any iterable of batches.

    A sequence of batches is read by index, so that a killed run resumes bit for bit; another iterable is read past what was used.

    An iterable may yield ``[batch, length]`` token ids or mappings with ``input_ids`` and optionally ``attention_mask``,
    ``labels`` (Hugging Face's convention: the same shape, -100 where a token is not a label) or ``position_ids`` (of packed documents). It is started again when it ends.

    Raises:
        ValueError: ``name`` is none of these, or the iterable is empty.
    """
    if isinstance(data, Rows):
        return rows_source(data, size, seed)
    if callable(data):
        return data
    if not isinstance(data, Iterable):
        raise ValueError(
            f"{name}: got {type(data).__name__}, wanted token rows, a function of the step or an iterable of batches"
        )
    if isinstance(data, Sequence) and len(data):
        return BatchesSource(data, name)
    return StreamSource(data, name)


def as_batch(item: Any, name: str = "batch") -> Batch:
    """A :class:`Batch` from token ids or from a mapping in Hugging Face's convention."""
    if isinstance(item, Batch):
        return item
    if isinstance(item, torch.Tensor):
        item = {"input_ids": item}
    if not isinstance(item, Mapping) or "input_ids" not in item:
        raise ValueError(f"{name}: got {type(item).__name__}, wanted token ids [batch, length] or a mapping with 'input_ids'")
    ids = torch.as_tensor(item["input_ids"])
    if ids.ndim != 2 or ids.shape[1] < 2 or ids.is_floating_point():
        raise ValueError(
            f"{name}: got input_ids of shape {tuple(ids.shape)} and {ids.dtype}, wanted integers [batch, length >= 2]"
        )
    attention, labels, positions = (item.get(name) for name in ("attention_mask", "labels", "position_ids"))
    mask = torch.ones_like(ids, dtype=torch.bool)
    if attention is not None:
        mask &= torch.as_tensor(attention).bool()
    if labels is not None:
        mask &= torch.as_tensor(labels) != -100
    return Batch(ids.long(), mask, attention, position_ids=None if positions is None else torch.as_tensor(positions))


def _endless(data: Iterable[Any], name: str) -> Iterator[Any]:
    while True:
        empty = True
        for item in data:
            empty = False
            yield item
        if empty:
            raise ValueError(
                f"{name}: got an iterable with no batches left; wanted one that can be started again (a list, a DataLoader)"
            )
