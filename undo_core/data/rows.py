"""Token rows: the one form in which every stage reads its data.

A row is a fixed number of token ids. The rows of a split live in one safetensors file; the order in which a stage reads
them is a function of ``(seed, step)`` alone, so that a resumed run sees what the uninterrupted one would have seen.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


@dataclass(frozen=True)
class Rows:
    """Rows of token ids, all of one length.

    Attributes:
        input_ids: ``[n, length]`` int32 token ids; ``pad_id`` marks what is not text.
        pad_id: id of the padding token; padding is never a label and never attended to by what comes before it.
        answer_mask: ``[n, length]`` bool, True on the tokens of the answer and its terminator, for splits that are scored by
            exact match; None for plain text, which is scored by cross-entropy.
        group: ``[n]`` int16 index into ``group_names`` (the operation of an arithmetic problem), or None.
        group_names: names of the groups.
        separator_id: id of the token before each document of a row, where documents are isolated from each other: none attends to
            another, and positions start again at each. None where a row is read as one text.
        choices: ``[n, k]`` int32, of multiple-choice questions: the token of each choice's letter, -1 beyond a question's choices. The
            answer is then one token, of the right letter, and the last of the row; the rows are scored by which letter is likeliest.
    """

    input_ids: torch.Tensor
    pad_id: int
    answer_mask: torch.Tensor | None = None
    group: torch.Tensor | None = None
    group_names: tuple[str, ...] = ()
    separator_id: int | None = None
    choices: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.input_ids.ndim != 2 or self.input_ids.shape[0] == 0:
            raise ValueError(f"input_ids: got shape {tuple(self.input_ids.shape)}, wanted [n, length] with n >= 1")
        if self.answer_mask is not None and self.answer_mask.shape != self.input_ids.shape:
            raise ValueError(
                f"answer_mask: got shape {tuple(self.answer_mask.shape)}, wanted {tuple(self.input_ids.shape)} like input_ids"
            )
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
        return int((self.input_ids != self.pad_id).sum())

    def position_ids(self, input_ids: torch.Tensor) -> torch.Tensor | None:
        """Positions of token ids of these rows, ``[n, length]`` in and out; None where documents are not isolated."""
        return None if self.separator_id is None else document_positions(input_ids, self.separator_id)

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
        """SHA-256 of the token ids, of what counts as padding and of what separates documents, in hexadecimal."""
        ids = self.input_ids.to(torch.int32).contiguous().numpy()
        isolated = "" if self.separator_id is None else f"{self.separator_id} "
        digest = hashlib.sha256(f"{ids.shape} {self.pad_id} {isolated}".encode())
        digest.update(ids.data)
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write the rows to a safetensors file."""
        tensors = {"input_ids": self.input_ids.to(torch.int32).contiguous()}
        if self.answer_mask is not None:
            tensors["answer_mask"] = self.answer_mask.contiguous()
        if self.group is not None:
            tensors["group"] = self.group.to(torch.int16).contiguous()
        if self.choices is not None:
            tensors["choices"] = self.choices.to(torch.int32).contiguous()
        # One entry only: safetensors writes several in an order that changes from run to run.
        facts = {"pad_id": self.pad_id, "group_names": self.group_names, "separator_id": self.separator_id}
        save_file(tensors, path, metadata={"rows": json.dumps(facts)})

    @classmethod
    def load(cls, path: Path) -> Rows:
        """Read rows written by :meth:`save`."""
        with safe_open(path, "pt") as file:
            keys, metadata = set(file.keys()), file.metadata() or {}
            if "input_ids" not in keys or "rows" not in metadata:
                raise ValueError(f"{path}: not a file of token rows (wanted a tensor 'input_ids' and a metadata entry 'rows')")
            facts = json.loads(metadata["rows"])
            return cls(
                input_ids=file.get_tensor("input_ids"),
                pad_id=facts["pad_id"],
                answer_mask=file.get_tensor("answer_mask") if "answer_mask" in keys else None,
                group=file.get_tensor("group") if "group" in keys else None,
                group_names=tuple(facts["group_names"]),
                separator_id=facts.get("separator_id"),
                choices=file.get_tensor("choices") if "choices" in keys else None,
            )


def document_positions(input_ids: torch.Tensor, separator_id: int) -> torch.Tensor:
    """``[n, length]`` int64: each token's distance from the separator before it, or from the row's beginning; 0 at a separator."""
    index = torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)
    return index - torch.where(input_ids == separator_id, index, 0).cummax(1).values


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
