"""Token rows: the one form in which every stage reads its data.

A row is a fixed number of token ids. The rows of a split live in one safetensors file; the order in which a stage reads
them is a function of ``(seed, step)`` alone, so that a resumed run sees what the uninterrupted one would have seen.
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

_ALL = slice(None)
_DTYPES = {  # of what a file of rows holds
    "input_ids": torch.int32,
    "lengths": torch.int32,
    "starts": torch.bool,
    "answer_mask": torch.bool,
    "group": torch.int16,
    "choices": torch.int32,
}


@dataclass(frozen=True)
class Rows:
    """Rows of token ids, all of one length.

    Attributes:
        input_ids: ``[n, length]`` int32 token ids.
        pad_id: id that fills a row after its text. It says nothing about which tokens are text: a tokenizer whose padding token also
            ends texts has it within them, and there it is a label like any other.
        answer_mask: ``[n, length]`` bool, True on the tokens of the answer and its terminator, for splits that are scored by
            exact match; None for plain text, which is scored by cross-entropy.
        group: ``[n]`` int16 index into ``group_names`` (the operation of an arithmetic problem), or None.
        group_names: names of the groups.
        lengths: ``[n]`` int32, how many of a row's tokens are text; the rest, on its right, is padding: never a label, and never attended
            to by what comes before it. None derives them: a row ends where its closing run of ``pad_id`` begins.
        starts: ``[n, length]`` bool, True where a document begins, where documents are isolated from each other: none attends to
            another, and positions start again at each. None where a row is read as one text.
        choices: ``[n, k]`` int32, of multiple-choice questions: the token of each choice's letter, -1 beyond a question's choices. The
            answer is then one token, of the right letter, and the last of the row; the rows are scored by which letter is likeliest.
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
                f"lengths: got {tuple(lengths.shape)} numbers from {lengths.min()} to {lengths.max()}, wanted one from 0 to {self.length} "
                f"for each of the {len(self)} rows"
            )
        object.__setattr__(self, "lengths", lengths.to(torch.int32))
        if self.input_ids.is_floating_point():
            raise ValueError(f"input_ids: got {self.input_ids.dtype}, wanted integers")
        if self.choices is not None:
            self._check_choices(self.choices)

    def _check_choices(self, choices: torch.Tensor) -> None:
        if choices.ndim != 2 or len(choices) != len(self):
            raise ValueError(f"choices: got shape {tuple(choices.shape)}, wanted [{len(self)}, k] for the rows of input_ids")
        if self.answer_mask is None or not (self.answer_mask[:, 1:].sum(1) == 1).all() or self.answer_mask[:, 0].any():
            raise ValueError("answer_mask: got one with choices that marks other than one token after a prompt in each row")
        if not (self.input_ids[self.answer_mask][:, None] == choices).any(1).all():
            raise ValueError("choices: got rows whose answer is none of them, wanted the tokens of all letters")

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def length(self) -> int:
        return self.input_ids.shape[1]

    def largest_id(self) -> int:
        """Of the tokens that a model has to know."""
        return int(self.input_ids.max()) if self.choices is None else int(max(self.input_ids.max(), self.choices.max()))

    def tokens(self) -> int:
        """Number of tokens that are not padding."""
        return int(self.lengths.sum())

    def text_mask(self, index: torch.Tensor | slice = _ALL) -> torch.Tensor:
        """``[rows, length]`` bool of the rows ``index``: True on text, False on padding."""
        return torch.arange(self.length) < self.lengths[index, None]

    def position_ids(self, index: torch.Tensor | slice = _ALL) -> torch.Tensor | None:
        """``[rows, length]`` int64 of the rows ``index``: each token's distance from the beginning of its document, or of the row; None
        where documents are not isolated."""
        if self.starts is None:
            return None
        starts = self.starts[index]
        at = torch.arange(self.length).expand(starts.shape)
        return at - torch.where(starts, at, 0).cummax(1).values

    def take(self, index: torch.Tensor | slice) -> Rows:
        """The chosen rows, by number or by a mask."""
        taken = {name: None if column is None else column[index] for name, column in self._columns().items()}
        return dataclasses.replace(self, **taken)

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """The token ids of ``parts``, one after the other; answers, groups and choices are left out."""
        columns = {name: [getattr(rows, name) for rows in parts] for name in ("input_ids", "lengths", "starts")}
        together = {n: None if any(column is None for column in many) else torch.cat(many) for n, many in columns.items()}
        return cls(pad_id=parts[0].pad_id, **together)

    def _columns(self) -> dict[str, torch.Tensor | None]:
        """Every tensor, in the dtype in which it is saved."""
        columns = {name: getattr(self, name) for name in _DTYPES}
        return {name: None if column is None else column.to(_DTYPES[name]) for name, column in columns.items()}

    def batch(self, step: int, size: int, seed: int) -> torch.Tensor:
        """Token ids ``[size, length]`` int64 of batch ``step``: the rows of :meth:`order`."""
        return self.input_ids[self.order(step, size, seed)].long()

    def order(self, step: int, size: int, seed: int) -> torch.Tensor:
        """Indices ``[size]`` int64 of batch ``step``'s rows: a fresh permutation of the rows in every epoch.

        A pure function of its arguments. An epoch's last rows continue with the first of the next, so every batch is full.
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
        """SHA-256 of the token ids, of what counts as padding and of where documents begin, in hexadecimal."""
        digest = hashlib.sha256(f"{tuple(self.input_ids.shape)}".encode())
        for name in ("input_ids", "lengths", "starts"):
            column = self._columns()[name]
            if column is not None:
                digest.update(name.encode())
                digest.update(column.contiguous().numpy().data)
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write the rows to a safetensors file."""
        tensors = {name: column.contiguous() for name, column in self._columns().items() if column is not None}
        # One entry only: safetensors writes several in an order that changes from run to run.
        facts = {"pad_id": self.pad_id, "group_names": self.group_names}
        save_file(tensors, path, metadata={"rows": json.dumps(facts)})

    @classmethod
    def load(cls, path: Path) -> Rows:
        """Read rows written by :meth:`save`.

        Raises:
            ValueError: a file of something else, or one that an older version wrote, which does not say where a row's text ends.
        """
        with safe_open(path, "pt") as file:
            keys, metadata = set(file.keys()), file.metadata() or {}
            if "input_ids" not in keys or "rows" not in metadata:
                raise ValueError(f"{path}: not a file of token rows (wanted a tensor 'input_ids' and a metadata entry 'rows')")
            if "lengths" not in keys:
                raise ValueError(
                    f"{path}: got token rows without 'lengths', from a version that told padding by its token; wanted rows of this version; "
                    f"prepare the data again"
                )
            facts = json.loads(metadata["rows"])
            tensors = {name: file.get_tensor(name) for name in _DTYPES if name in keys}
            return cls(pad_id=facts["pad_id"], group_names=tuple(facts["group_names"]), **tensors)


def _derived_lengths(input_ids: torch.Tensor, pad_id: int) -> torch.Tensor:
    """``[n]``: where the closing run of ``pad_id`` begins in each row.

    Raises:
        ValueError: a row has ``pad_id`` within its text too; there the token has a meaning of its own, with which a text can end.
    """
    text = input_ids != pad_id
    at = torch.arange(1, input_ids.shape[1] + 1)
    lengths = torch.where(text, at, 0).amax(1)
    within = text.sum(1) < lengths
    if within.any():
        row = int(within.int().argmax())
        raise ValueError(
            f"lengths: got none and a row {row} with the padding token {pad_id} within its text, wanted the number of tokens of each row "
            f"that are text"
        )
    return lengths


_cache: dict[tuple[int, int, int], torch.Tensor] = {}


def _permutation(n: int, seed: int, epoch: int) -> torch.Tensor:
    """Permutation of ``n`` rows for ``(seed, epoch)``; the last few are kept, since consecutive batches share one."""
    key = (n, seed, epoch)
    if key not in _cache:
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        if len(_cache) > 8:
            _cache.pop(next(iter(_cache)))
        _cache[key] = torch.randperm(n, generator=generator)
    return _cache[key]
