"""Batches, and the sources that give one batch per training step."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch

from undo_core import distributed
from undo_core.data.limits import Limits
from undo_core.data.sequences import Sequences
from undo_core.io.files import hash_json


@dataclass(frozen=True)
class Batch:
    """A batch of sequences: token ids, and which of them count as labels.

    Attributes:
        input_ids: ``[batch, length]`` int64.
        mask: ``[batch, length]`` bool, True where the token counts as a label. The first column is ignored: nothing predicts
            it.
        attention_mask: ``[batch, length]``, or None. A causal model needs none for sequences padded on the right.
        position_ids: ``[batch, length]`` int64, or None. Where they restart, a new document begins, which does not attend to
            earlier ones. They must not restart within the text of an attention mask: transformers would let such documents
            attend to each other.
        reference: ``[batch, length - 1, ...]`` float values that the loss needs: of another model in forget batches of unlearning,
            the draws of the samples in batches of on-policy distillation.
        labels: ``[batch, length]`` int64 tokens to be predicted, aligned with ``input_ids`` (not shifted); None for the ids
            themselves. Values where ``mask`` is False are ignored.
        whole: for a micro-batch, the batch that it is part of.
        index: ``[batch]`` int64 indices into the :class:`Sequences` that the batch was drawn from, on the CPU; None for other
            data.
    """

    input_ids: torch.Tensor
    mask: torch.Tensor
    attention_mask: torch.Tensor | None = None
    index: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    reference: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    whole: Batch | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name in ("mask", "attention_mask", "labels"):
            column = getattr(self, name)
            if column is not None and column.shape != self.input_ids.shape:
                raise ValueError(
                    f"{name}: got shape {tuple(column.shape)}, wanted that of input_ids, {tuple(self.input_ids.shape)}"
                )
        if self.position_ids is None:
            return
        if self.position_ids.shape != self.input_ids.shape or self.position_ids.is_floating_point():
            raise ValueError(
                f"position_ids: got shape {tuple(self.position_ids.shape)} and {self.position_ids.dtype}, wanted integers of "
                f"the shape of input_ids, {tuple(self.input_ids.shape)}"
            )
        if self.attention_mask is not None:
            text = self.attention_mask.bool()
            again = self.position_ids[:, 1:] <= self.position_ids[:, :-1]
            if bool((again & text[:, 1:] & text[:, :-1]).any()):
                raise ValueError(
                    "position_ids: got them with an attention_mask and starting again within its text, wanted only one of "
                    "them; sequences padded on the right need no attention_mask"
                )

    def digest(self) -> str:
        """SHA-256 of every column."""
        columns = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "whole"}
        held = {name: column.cpu() for name, column in columns.items() if column is not None}
        parts = {n: [str(c.dtype), list(c.shape), hashlib.sha256(c.contiguous().numpy()).hexdigest()] for n, c in held.items()}
        return hash_json(parts)

    def check(self, limits: Limits, name: str) -> None:
        """Raises a ValueError if ids, labels or positions exceed ``limits``; ``name`` is the argument named in the error."""
        columns = [self.input_ids] if self.labels is None else [self.input_ids, self.labels[self.mask]]
        ends = [column.aminmax() for column in columns if column.numel()]
        limits.check(self.input_ids.shape[1], min(int(end.min) for end in ends), max(int(end.max) for end in ends), name)
        last = -1 if self.position_ids is None else int(self.position_ids.max())
        if limits.positions is not None and last >= limits.positions:
            raise ValueError(f"{name}: got position {last}, wanted positions below the model's {limits.positions}")

    @property
    def counted(self) -> int:
        """Number of labels in the batch."""
        return int(self.mask[:, 1:].sum())

    def to(self, device: torch.device) -> Batch:
        columns = {name: column.to(device) for name, column in self._columns().items() if name != "index"}
        return Batch(**columns, index=self.index)

    def split(self, size: int) -> list[Batch]:
        """Splits the batch into micro-batches of at most ``size`` sequences."""
        columns = {name: column.split(size) for name, column in self._columns().items()}
        return [Batch(**dict(zip(columns, part, strict=True)), whole=self) for part in zip(*columns.values(), strict=True)]

    def share(self) -> Batch:
        """Returns this rank's sequences of a micro-batch; the micro-batch itself in a process that runs alone.

        Raises:
            ValueError: the micro-batch has fewer sequences than there are ranks.
        """
        if distributed.count() == 1:
            return self
        size, count = len(self.input_ids), distributed.count()
        if size < count:
            raise ValueError(f"batch: got a micro-batch of {size} sequences on {count} ranks, wanted at least one for each")
        start, end = distributed.share(size)
        columns = {name: column[start:end] for name, column in self._columns().items()}
        return Batch(**columns, whole=self if self.whole is None else self.whole)

    def _columns(self) -> dict[str, torch.Tensor]:
        """Every tensor of the batch that is not None, by name."""
        columns = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "whole"}
        return {name: column for name, column in columns.items() if column is not None}

    @property
    def inputs(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Inputs of a model, each ``[batch, length]`` or None: token ids, attention mask and position ids."""
        return self.input_ids, self.attention_mask, self.position_ids

    def shifted(self) -> tuple[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor, torch.Tensor]:
        """Returns inputs, labels and label mask, each ``[batch, length - 1]``: position t predicts token t + 1."""
        ids, *rest = (None if column is None else column[:, :-1] for column in self.inputs)
        labels = self.input_ids if self.labels is None else self.labels
        return (ids, *rest), labels[:, 1:], self.mask[:, 1:]


Source = Callable[[int], Batch]  # from the step to its batch; must be a pure function for a run to be resumable


@dataclass(frozen=True)
class SequenceSource:
    """Batches of ``size`` sequences, shuffled by ``seed``; a pure function of the step."""

    sequences: Sequences
    size: int
    seed: int

    def __call__(self, step: int) -> Batch:
        index = self.sequences.order(step, self.size, self.seed)
        ids, sequences = self.sequences.input_ids[index].long(), self.sequences
        return Batch(ids, sequences.text_mask(index), index=index, position_ids=sequences.position_ids(index))

    def identity(self) -> dict[str, Any]:
        """Everything that decides the batches, as JSON values."""
        return {"rows": self.sequences.digest(), "size": self.size, "seed": self.seed}


@dataclass(frozen=True)
class ReadSource:
    """The batches of all steps of ``source``, read in advance; it has the identity of ``source``."""

    source: Source
    batches: list[Batch]

    def __call__(self, step: int) -> Batch:
        return self.batches[step]

    def identity(self) -> dict[str, Any] | None:
        """Identity of ``source``."""
        return identity_of(self.source)


@dataclass(frozen=True)
class BatchesSource:
    """The batches of a sequence in order, repeated from the start after the last; a pure function of the step."""

    batches: Sequence[Any]
    name: str

    def __call__(self, step: int) -> Batch:
        return as_batch(self.batches[step % len(self.batches)], self.name)

    def identity(self) -> dict[str, Any]:
        """Digest of every batch."""
        return {"batches": hash_json([as_batch(item, self.name).digest() for item in self.batches])}


@dataclass
class StreamSource:
    """The batches of an iterable, which is restarted when it ends; a resumed run skips the batches that were used before."""

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
        """None: the contents of an iterable are unknown until it is read."""


@dataclass(frozen=True)
class CheckedSource:
    """The batches of ``source``, each checked against ``limits``, if given, before a model reads it."""

    source: Source
    name: str
    limits: Limits | None

    def __call__(self, step: int) -> Batch:
        batch = as_batch(self.source(step), self.name)
        if self.limits is not None:
            batch.check(self.limits, self.name)
        return batch

    def identity(self) -> dict[str, Any] | None:
        """Identity of ``source``."""
        return identity_of(self.source)


def identity_of(source: Source) -> dict[str, Any] | None:
    """Returns what identifies a source's batches, as JSON values; None for an iterable other than a sequence.

    For :class:`Sequences` and lists it covers all batches; for a function, only the batch of step 0.
    """
    if hasattr(source, "identity"):
        return source.identity()
    return {"first": as_batch(source(0)).digest()}


def sequence_source(sequences: Sequences, size: int, seed: int) -> Source:
    """Returns the :class:`SequenceSource` of ``sequences``."""
    return SequenceSource(sequences, size, seed)


def as_source(
    data: Sequences | Source | Iterable[Any], *, size: int, seed: int, name: str, limits: Limits | None = None
) -> Source:
    """Makes a source from token sequences, from a function of the step, or from any iterable of batches.

    A sequence of batches is read by index, so that a killed run resumes bit for bit. Any other iterable is restarted when it
    ends, and a resumed run skips the batches that were used before. Batches are ``[batch, length]`` token ids or mappings, see
    :func:`as_batch`.

    Args:
        data: token sequences, function or iterable.
        size: sequences per batch, for token sequences.
        seed: seed of the order, for token sequences.
        name: name of the argument that held ``data``, for errors.
        limits: limits of the models that read the data. Token sequences are checked here, other batches as they are read.

    Raises:
        ValueError: ``data`` is none of these, the iterable is empty, or the data exceeds ``limits``.
    """
    if isinstance(data, Sequences):
        data = sequence_source(data, size, seed)
    if isinstance(data, SequenceSource):
        if limits is not None:
            limits.check_sequences(data.sequences, name)
        return data
    if isinstance(data, ReadSource):
        return data
    if not callable(data) and not isinstance(data, Iterable):
        raise ValueError(
            f"{name}: got {type(data).__name__}, wanted token sequences, a function of the step or an iterable of batches"
        )
    source = data
    if not callable(data):
        source = BatchesSource(data, name) if isinstance(data, Sequence) and len(data) else StreamSource(data, name)
    return CheckedSource(source, name, limits)


def as_batch(item: Any, name: str = "batch") -> Batch:
    """Makes a :class:`Batch` from token ids ``[batch, length]``, or from a mapping in the convention of transformers.

    A mapping has ``input_ids`` and optionally ``attention_mask`` (1 for text, 0 for padding), ``labels`` and ``position_ids``
    (for packed documents). Labels are aligned with the ids, with -100 for no label; they are shifted in the loss, and the
    attention mask does not affect them, as in transformers' own loss. Without labels, a token is a label if it and the token
    before it are text. Columns are tensors, arrays or lists of integers, all of one shape; an attention mask may be boolean.

    Raises:
        ValueError: a column has a wrong shape or type, or an invalid value; the message names the column and what it has.
    """
    if isinstance(item, Batch):
        return item
    if isinstance(item, (torch.Tensor, np.ndarray, list, tuple)):
        item = {"input_ids": item}
    if not isinstance(item, Mapping) or item.get("input_ids") is None:
        raise ValueError(f"{name}: got {type(item).__name__}, wanted token ids [batch, length] or a mapping with 'input_ids'")
    columns = {key: _column(item[key], key, name) for key in COLUMNS if item.get(key) is not None}
    ids = columns["input_ids"]
    if ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise ValueError(
            f"{name}: got input_ids of shape {tuple(ids.shape)} and {ids.dtype}, wanted integers [batch, length >= 2]"
        )
    for key, column in columns.items():
        if column.shape != ids.shape:
            shifted = "; they are not shifted beforehand" if key == "labels" else ""
            raise ValueError(
                f"{name}: got {key} of shape {tuple(column.shape)}, wanted {tuple(ids.shape)} like input_ids{shifted}"
            )
        least, most, wanted = COLUMNS[key]
        values = column.masked_fill(column == IGNORED, 0) if key == "labels" else column
        low, high = (int(value) for value in values.aminmax())
        if low < least or (most is not None and high > most):
            raise ValueError(f"{name}: got {key} with {low if low < least else high}, wanted {wanted}")
    attention, labels, positions = (columns.get(key) for key in ("attention_mask", "labels", "position_ids"))
    if labels is not None:
        mask = labels != IGNORED
    elif attention is not None:
        text = attention.bool()
        mask = torch.cat([text[:, :1], text[:, 1:] & text[:, :-1]], dim=1)
    else:
        mask = torch.ones_like(ids, dtype=torch.bool)
    return Batch(ids, mask, attention, position_ids=positions, labels=labels)


IGNORED = -100  # marks a position without a label, as in transformers
COLUMNS: dict[str, tuple[int, int | None, str]] = {  # columns of a mapping: smallest value, largest value, and both in words
    "input_ids": (0, None, "token ids, from 0"),
    "attention_mask": (0, 1, "1 for text and 0 for padding"),
    "labels": (0, None, "token ids, from 0, or -100 for none"),
    "position_ids": (0, None, "positions, from 0"),
}


def _column(values: Any, key: str, name: str) -> torch.Tensor:
    """Converts ``values`` to an int64 tensor."""
    try:
        if isinstance(values, (list, tuple)) and values and isinstance(values[0], torch.Tensor):
            values = torch.stack(tuple(values))
        column = values if isinstance(values, torch.Tensor) else torch.from_numpy(np.array(values))
    except (ValueError, TypeError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{name}: got {key} that cannot become a tensor ({reason}), wanted integers [batch, length]") from None
    truth = column.dtype == torch.bool and key == "attention_mask"
    if not truth and (column.is_floating_point() or column.is_complex() or column.dtype == torch.bool):
        raise ValueError(
            f"{name}: got {key} of shape {tuple(column.shape)} and {column.dtype}, wanted integers [batch, length]"
        )
    return column.long()


def _endless(data: Iterable[Any], name: str) -> Iterator[Any]:
    while True:
        empty = True
        for item in data:
            empty = False
            yield item
        if empty:
            raise ValueError(
                f"{name}: got an iterable with no batches left; wanted one that can be iterated again (a list, a DataLoader)"
            )
