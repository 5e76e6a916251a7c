"""Sequences of token ids, all of one length: the form in which every stage reads its data.

The sequences of a split are stored in one safetensors file. A stage reads them in an order that depends only on
``(seed, step)``, so that a resumed run sees the same batches as an uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from undo_core.io.untrusted import checked_object, refused

_ALL = slice(None)
_DTYPES = {  # the tensors of a file of sequences, and the dtypes in which they are saved
    "input_ids": torch.int32,
    "lengths": torch.int32,
    "starts": torch.bool,
    "answer_mask": torch.bool,
    "group": torch.int16,
    "choices": torch.int32,
}


@dataclass(frozen=True)
class Sequences:
    """Sequences of token ids, all of one length.

    Attributes:
        input_ids: ``[n, length]`` int32 token ids.
        pad_id: id that fills a sequence after its text. It does not tell which tokens are text: where a tokenizer's padding
            token also ends texts, it occurs within them and is a label like any other.
        answer_mask: ``[n, length]`` bool, True on the tokens of the answer and its terminator, for splits that are scored by
            exact match; None for plain text, which is scored by cross-entropy.
        group: ``[n]`` int16 index into ``group_names`` (the operation of an arithmetic problem), or None.
        group_names: names of the groups.
        lengths: ``[n]`` int32, the number of text tokens in each sequence. The tokens to their right are padding: never a
            label, and never attended to by the text. None derives the lengths: a sequence's text ends where its final run of
            ``pad_id`` begins.
        starts: ``[n, length]`` bool, True where a document begins, for isolated documents: none attends to another, and
            positions start again at each. None if each sequence is read as one text.
        choices: ``[n, k]`` int32, for multiple-choice questions: the token of each choice's letter, -1 beyond a question's
            choices. The answer is then a single token, the right letter, after the prompt. A sequence counts as right if its
            right letter is the likeliest.
    """

    input_ids: torch.Tensor
    pad_id: int
    answer_mask: torch.Tensor | None = None
    group: torch.Tensor | None = None
    group_names: tuple[str, ...] = ()
    choices: torch.Tensor | None = None
    lengths: torch.Tensor | None = None
    starts: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.input_ids.ndim != 2 or self.input_ids.shape[0] == 0:
            raise ValueError(f"input_ids: got shape {tuple(self.input_ids.shape)}, wanted [n, length] with n >= 1")
        for name in ("answer_mask", "starts"):
            column = getattr(self, name)
            if column is not None and column.shape != self.input_ids.shape:
                raise ValueError(
                    f"{name}: got shape {tuple(column.shape)}, wanted {tuple(self.input_ids.shape)} like input_ids"
                )
        lengths = _derived_lengths(self.input_ids, self.pad_id) if self.lengths is None else self.lengths
        if lengths.shape != (len(self),) or not ((lengths >= 0) & (lengths <= self.length)).all():
            raise ValueError(
                f"lengths: got {tuple(lengths.shape)} numbers from {lengths.min()} to {lengths.max()}, wanted one from 0 to "
                f"{self.length} for each of the {len(self)} sequences"
            )
        object.__setattr__(self, "lengths", lengths.to(torch.int32))
        if self.input_ids.is_floating_point():
            raise ValueError(f"input_ids: got {self.input_ids.dtype}, wanted integers")
        if self.choices is not None:
            self._check_choices(self.choices)

    def _check_choices(self, choices: torch.Tensor) -> None:
        if choices.ndim != 2 or len(choices) != len(self):
            raise ValueError(
                f"choices: got shape {tuple(choices.shape)}, wanted [{len(self)}, k] for the sequences of input_ids"
            )
        if self.answer_mask is None or not (self.answer_mask[:, 1:].sum(1) == 1).all() or self.answer_mask[:, 0].any():
            raise ValueError(
                "answer_mask: got choices and a mask with none or several tokens in a sequence, wanted one after the prompt"
            )
        if not (self.input_ids[self.answer_mask][:, None] == choices).any(1).all():
            raise ValueError("choices: got sequences whose answer is not among them, wanted the tokens of all letters")

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def length(self) -> int:
        return self.input_ids.shape[1]

    def largest_id(self) -> int:
        """Returns the largest token id that a model must know, letters of choices included."""
        return int(self.input_ids.max()) if self.choices is None else int(max(self.input_ids.max(), self.choices.max()))

    def tokens(self) -> int:
        """Returns the number of tokens that are not padding."""
        return int(self.lengths.sum())

    def text_mask(self, index: torch.Tensor | slice = _ALL) -> torch.Tensor:
        """Returns ``[sequences, length]`` bool for the sequences ``index``: True on text, False on padding."""
        return torch.arange(self.length) < self.lengths[index, None]

    def position_ids(self, index: torch.Tensor | slice = _ALL) -> torch.Tensor | None:
        """Returns ``[sequences, length]`` int64 for the sequences ``index``, or None if documents are not isolated.

        A position is a token's distance from the beginning of its document (or of the sequence, for a document continued from
        another sequence).
        """
        if self.starts is None:
            return None
        starts = self.starts[index]
        at = torch.arange(self.length).expand(starts.shape)
        return at - torch.where(starts, at, 0).cummax(1).values

    def take(self, index: torch.Tensor | slice) -> Sequences:
        """Returns the sequences that ``index`` selects, by number or by mask."""
        taken = {name: None if column is None else column[index] for name, column in self._columns().items()}
        return dataclasses.replace(self, **taken)

    def distinct(self) -> tuple[Sequences, torch.Tensor]:
        """Returns the sequences without repeats, and ``[n]`` int64, the index among them of each of these sequences.

        Repeats agree in every column except the group. The sequences keep their order.
        """
        columns = [column.long() for name, column in self._columns().items() if column is not None and name != "group"]
        rows = torch.cat([column.reshape(len(self), -1) for column in columns], 1)
        _, of = torch.unique(rows, dim=0, return_inverse=True)
        first = torch.full((len(self),), len(self)).scatter_reduce(0, of, torch.arange(len(self)), "amin")[of]
        kept, index = torch.unique(first, return_inverse=True)
        return self.take(kept), index

    @classmethod
    def joined(cls, parts: Sequence[Sequences]) -> Sequences:
        """Concatenates the token ids, lengths and document starts of ``parts``; drops answers, groups and choices."""
        columns = {name: [getattr(sequences, name) for sequences in parts] for name in ("input_ids", "lengths", "starts")}
        together = {n: None if any(column is None for column in many) else torch.cat(many) for n, many in columns.items()}
        return cls(pad_id=parts[0].pad_id, **together)

    def _columns(self) -> dict[str, torch.Tensor | None]:
        """Returns every column, converted to the dtype in which it is saved."""
        columns = {name: getattr(self, name) for name in _DTYPES}
        return {name: None if column is None else column.to(_DTYPES[name]) for name, column in columns.items()}

    def batch(self, step: int, size: int, seed: int) -> torch.Tensor:
        """Returns the token ids ``[size, length]`` int64 of batch ``step``: the sequences that :meth:`order` gives."""
        return self.input_ids[self.order(step, size, seed)].long()

    def order(self, step: int, size: int, seed: int) -> torch.Tensor:
        """Returns the indices ``[size]`` int64 of the sequences of batch ``step``; each epoch is a new permutation of the
        sequences.

        The result depends on the arguments alone. Where an epoch ends within a batch, the next epoch fills it, so every batch
        is full.
        """
        n = len(self)
        first, taken = step * size, []
        while size > 0:
            epoch, offset = divmod(first, n)
            count = min(size, n - offset)
            taken.append(_permutation(n, seed, epoch)[offset : offset + count])
            first, size = first + count, size - count
        return torch.cat(taken)

    def digest(self) -> str:
        """Returns the SHA-256 of token ids, lengths and document starts, in hexadecimal."""
        digest = hashlib.sha256(f"{tuple(self.input_ids.shape)}".encode())
        for name in ("input_ids", "lengths", "starts"):
            column = self._columns()[name]
            if column is not None:
                digest.update(name.encode())
                digest.update(column.contiguous().numpy().data)
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Writes the sequences to a safetensors file."""
        tensors = {name: column.contiguous() for name, column in self._columns().items() if column is not None}
        # A single metadata entry, because safetensors writes several in an order that changes from run to run.
        facts = {"pad_id": self.pad_id, "group_names": self.group_names}
        save_file(tensors, path, metadata={"rows": json.dumps(facts)})

    @classmethod
    def load(cls, path: Path) -> Sequences:
        """Reads sequences that :meth:`save` wrote.

        Raises:
            ValueError: the file is damaged or holds no sequences, or an older version wrote it, without the lengths of the
                sequences.
        """
        with refused(f"{path}"), safe_open(path, "pt") as file:
            keys, metadata = set(file.keys()), file.metadata() or {}
            if "input_ids" not in keys or "rows" not in metadata:
                raise ValueError("not a file of token sequences (wanted a tensor 'input_ids' and a metadata entry 'rows')")
            if "lengths" not in keys:
                raise ValueError(
                    "got token sequences without 'lengths', written by an older version; wanted sequences of this "
                    "version; prepare the data again"
                )
            facts = checked_object(json.loads(metadata["rows"]), "rows", pad_id=int, group_names=list)
            tensors = {name: file.get_tensor(name) for name in _DTYPES if name in keys}
            for name, tensor in tensors.items():
                if tensor.dtype != _DTYPES[name]:
                    raise ValueError(f"got {name} in {tensor.dtype}, wanted {_DTYPES[name]}")
            names, group = tuple(facts["group_names"]), tensors.get("group")
            if not all(isinstance(name, str) for name in names):
                raise ValueError(f"got the group names {names}, wanted texts")
            if group is not None and (
                group.shape != tensors["input_ids"].shape[:1] or not ((group >= 0) & (group < len(names))).all()
            ):
                raise ValueError(f"got a group that is none of {', '.join(names)}, wanted an index of one for each sequence")
            return cls(pad_id=facts["pad_id"], group_names=names, **tensors)


def _derived_lengths(input_ids: torch.Tensor, pad_id: int) -> torch.Tensor:
    """Returns ``[n]``: the position at which the final run of ``pad_id`` begins in each sequence.

    Raises:
        ValueError: a sequence has ``pad_id`` within its text, so that the final run may belong to the text too.
    """
    text = input_ids != pad_id
    at = torch.arange(1, input_ids.shape[1] + 1)
    lengths = torch.where(text, at, 0).amax(1)
    within = text.sum(1) < lengths
    if within.any():
        sequence = int(within.int().argmax())
        raise ValueError(
            f"lengths: got none and a sequence {sequence} with the padding token {pad_id} within its text, wanted the number "
            "of tokens of each sequence that are text"
        )
    return lengths


_cache: dict[tuple[int, int, int], torch.Tensor] = {}


def _permutation(n: int, seed: int, epoch: int) -> torch.Tensor:
    """Returns the permutation of ``n`` sequences for ``(seed, epoch)``; caches the last few, which batches share."""
    key = (n, seed, epoch)
    if key not in _cache:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        if len(_cache) > 8:
            _cache.pop(next(iter(_cache)))
        _cache[key] = torch.randperm(n, generator=generator)
    return _cache[key]
