"""Cache of a teacher's outputs on disk.

The teacher runs once over the sequences; then any number of students, data orders and seeds can be distilled without its trunk.

A cache is a folder of memory-mapped safetensors shards and ``cache.json``. It stores the positions that count (those whose next
token is text), sequence after sequence; sequence ``i`` has the positions ``offsets[i]`` to ``offsets[i + 1]`` (exclusive):

- cached: ``hidden`` ``[positions, d]`` in float32 or bfloat16, and ``lse`` ``[positions]`` float32: ``d * itemsize + 4`` bytes
  per position. The loss is exact for the stored hidden states.
- topk: ``indices`` ``[positions, k]`` int32 and ``logprobs`` ``[positions, k]`` float32: ``8 * k`` bytes per position. The rest
  of the vocabulary counts as one outcome.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from undo_core.checkpoints.files import MappedFile
from undo_core.data.limits import limits_of
from undo_core.data.sequences import Sequences
from undo_core.distillation.cache_identity import (
    batch_of,
    columns_of,
    form_of,
    head_identity,
    identity_of,
    require_same,
    sequences_identity,
    teacher_identity,
)
from undo_core.distillation.cache_writer import PROGRESS, CacheWriter, DiskFull, describe_error, errors_of
from undo_core.distillation.streaming import WeightReader, load_head, weights_digest
from undo_core.distillation.teacher import TeacherConfig
from undo_core.io.files import write_json
from undo_core.io.progress import console
from undo_core.io.untrusted import checked_object, inside, read_object
from undo_core.models import Head, check_vocab_size, head_of
from undo_core.models.adapters import bare
from undo_core.training import Batch
from undo_core.training.losses import HiddenTargets, TopTargets

FACTS = "cache.json"
DTYPES = ("float32", "bfloat16")  # of stored hidden states
SHARD_BYTES = 2 * 10**9


def cache_teacher(
    teacher: PreTrainedModel,
    sequences: Sequences,
    folder: str | Path,
    config: TeacherConfig | None = None,
    *,
    check: Sequences | None = None,
    shard_bytes: int = SHARD_BYTES,
    checkpoint_seconds: float = 10.0,
    title: str = "cache",
    progress: bool = True,
) -> CachedTeacher:
    """Runs ``teacher`` once over ``sequences`` and stores in ``folder`` the outputs that :func:`undo_core.distill` needs.

    If the call is killed, the same call continues; on a complete cache it does nothing. Every batch is filled up to
    ``batch_size`` sequences, because the bits of a forward pass can depend on its shape. The stored bits equal those of the
    resident teacher if ``batch_size`` is the distillation's micro-batch size and the matrix products of this machine do not
    depend on a sequence's place in the batch. As measured on x86, they do not if ``batch_size`` is a multiple of 16; otherwise
    the last bit can differ. On a GPU the loss uses the stored log-sum-exps instead of computing them again, which can change
    the last bit too.

    Args:
        teacher: model in memory, or streamed (:func:`undo_core.distillation.streaming.stream_model`); put in evaluation mode
            and otherwise unchanged.
        sequences: all sequences that a student will be distilled on; the cache belongs to these sequences in this order.
        folder: a new folder, or one with an unfinished or complete cache of the same teacher, sequences and settings.
        config: kind (cached or topk), dtype, k, batch_size (None for 128).
        check: sequences on which the error of an approximate cache is measured; None for the first sequences of ``sequences``.
        shard_bytes: approximate size of a file.
        checkpoint_seconds: seconds between flushes to disk.
        title: label of the progress bar.
        progress: whether to show the progress bar.

    Memory: the teacher, and the hidden states of one batch (topk: also 64 MiB of logits, and a float32 copy of a 16-bit head).

    Raises:
        ValueError: an invalid argument, or a folder with other contents; nothing is written.
        OSError: too little disk space, found before the start or on the way; finished work is kept.
    """
    config, folder = config or TeacherConfig("cached"), Path(folder)
    if config.kind not in ("cached", "topk"):
        raise ValueError(f"config: got the kind {config.kind}, wanted cached or topk")
    limits = limits_of(teacher)
    limits.check_sequences(sequences, "sequences")
    if check is not None:
        limits.check_sequences(check, "check")
    teacher.eval()
    teacher = bare(teacher)
    head = head_of(teacher)
    identity = identity_of(teacher, head, sequences, config)
    check_vocab_size(config.vocab_size, teacher=identity["vocabulary"])
    known = config.vocab_size or identity["vocabulary"]
    if config.kind == "topk" and config.k >= known:
        raise ValueError(f"k: got {config.k}, wanted less than the vocabulary's {known}")
    if not (folder / FACTS).exists():
        work = CacheWriter(teacher, head, sequences, folder, config, identity, shard_bytes)
        with DiskFull(folder, work.bytes):
            work.run(checkpoint_seconds, title, progress)
        facts: dict[str, Any] = {"identity": identity, "shards": work.names, "positions": work.total, "bytes": work.bytes}
        if config.kind == "topk" or config.dtype != "float32":
            facts["error"] = errors_of(teacher, head, check or sequences, config)
            for name, error in facts["error"].items() if progress else ():
                console.print(f"{title}: {describe_error(name, error)}")
        write_json(folder / FACTS, facts)
    if (folder / PROGRESS).exists():  # also if a call was killed just here
        (folder / PROGRESS).unlink()
    _, found = read_facts(folder)
    require_same(found, identity, f"folder: got {folder}, a cache", "wanted a new folder")
    return CachedTeacher(folder, head if config.kind == "cached" else None)


def read_facts(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the contents of a cache's ``cache.json``, and of them the identity; a ValueError if it is damaged."""
    where = f"{folder / FACTS}"
    shape = {"kind": str, "vocabulary": int, "hidden_size": int, "vocab_size?": (int, type(None)), "k?": int}
    facts = read_object(folder / FACTS, identity=shape, shards=[str])
    identity = facts["identity"]
    if identity["kind"] == "topk":
        checked_object(identity, where, k=int)
    elif identity["kind"] != "cached" or identity.get("dtype") not in DTYPES:
        raise ValueError(
            f"{where}: got {identity['kind']} in {identity.get('dtype')}, wanted topk, or cached in {', '.join(DTYPES)}"
        )
    if not facts["shards"]:
        raise ValueError(f"{where}: got no shards, wanted at least one")
    return facts, identity


class CachedTeacher:
    """Teacher that reads a cache made by :func:`cache_teacher`; use :meth:`open`, which checks that it is the right cache.

    Attributes:
        vocabulary: number of vocabulary entries of the head.
        vocab_size: number of entries that are real tokens; None if the cache was made with all entries.
        facts: contents of ``cache.json``.

    Memory: the head (cached), and the outputs of one batch.
    """

    def __init__(self, folder: Path, head: Head | None) -> None:
        self.facts, identity = read_facts(folder)
        self.vocabulary, self.kind, self.head = identity["vocabulary"], identity["kind"], head
        self.vocab_size: int | None = identity.get("vocab_size")
        self._columns, self._sequences = columns_of(identity), None
        paths = [inside(folder, name, f"{folder / FACTS}") for name in self.facts["shards"]]
        self._shards = [MappedFile(path, read_only=True) for path in paths]
        counts = [self._checked(shard) for shard in self._shards]
        self._first = torch.tensor([0, *(int(c[-1]) for c in counts)]).cumsum(0)  # index of the first position of each shard
        starts = [offsets[:-1] + first for offsets, first in zip(counts, self._first.tolist(), strict=False)]
        self._offsets = torch.cat([*starts, self._first[-1:]])

    def _checked(self, shard: MappedFile) -> torch.Tensor:
        """Returns the offsets of a shard; raises a ValueError unless its columns have a row for each position."""
        offsets = shard.tensor("offsets", torch.int64).clone()
        rising = offsets.ndim == 1 and len(offsets) > 0 and offsets[0] == 0 and bool((offsets.diff() >= 0).all())
        for name, (dtype, width) in self._columns.items():
            rows = int(offsets[-1]) if rising else -1
            if shard.tensor(name, dtype).shape not in ((rows, width), (rows,) if width == 1 else None):
                raise ValueError(
                    f"{shard.path}: got {name} whose rows are not the positions of the offsets; the cache is damaged"
                )
        return offsets

    @classmethod
    def open(
        cls, folder: str | Path, head: PreTrainedModel | Head | str | Path | None = None, config: TeacherConfig | None = None
    ) -> CachedTeacher:
        """Opens a complete cache.

        Args:
            folder: folder made by :func:`cache_teacher`.
            head: the teacher or its checkpoint folder, whose weights are all compared with those that the cache was made from,
                and of which only the head is kept; or a head alone. topk needs none, but compares it if given.
            config: expected kind, dtype and k, and vocab_size and batch_size unless these are None; None accepts any cache.

        Raises:
            FileNotFoundError: there is no complete cache in ``folder``.
            ValueError: the cache has another teacher, kind, dtype, k, vocab_size or batch_size than expected.
        """
        folder = Path(folder)
        if not (folder / FACTS).is_file():
            raise FileNotFoundError(f"cache: got {folder}, which has no {FACTS}; wanted a complete cache")
        _, identity = read_facts(folder)
        if config is not None:
            expected = form_of(config) | ({} if config.batch_size is None else batch_of(config))
            require_same(identity, expected, f"cache: got {folder}, made", "wanted one made as the settings say")
        expected: dict[str, Any] = {}
        if isinstance(head, (str, Path)):
            reader = WeightReader(Path(head))
            expected |= teacher_identity(reader.model, reader.digest())
            head = load_head(reader)
        elif isinstance(head, torch.nn.Module):
            head = bare(head)
            expected |= teacher_identity(head, weights_digest(head))
            head = head_of(head)
        if head is not None:
            expected |= head_identity(head)
        elif identity["kind"] == "cached":
            raise ValueError("head: got None, wanted the teacher, its checkpoint folder or its head, with which it was cached")
        require_same(identity, expected, f"cache: got {folder}, made", "wanted the cache of this teacher")
        kept = None if head is None or identity["kind"] == "topk" else dataclasses.replace(head, weight=head.weight.detach())
        return cls(folder, kept)

    def check(self, text: Any) -> None:
        """Raises a ValueError unless ``text`` is the sequences that the cache was made from."""
        if not isinstance(text, Sequences):
            raise ValueError(
                f"text: got {type(text).__name__}, wanted the token sequences (undo_core.data.sequences.Sequences) that the "
                "teacher was cached on; other data needs a resident or streamed teacher"
            )
        got = "text: got sequences that are not those of the cache, which was made"
        require_same(self.facts["identity"], sequences_identity(text), got, "wanted the sequences that it was made from")
        self._sequences = text

    def identity(self) -> dict[str, Any]:
        """Returns the identity of what the cache was made from: teacher, sequences and settings."""
        return dict(self.facts["identity"])

    def targets(self, batch: Batch) -> HiddenTargets | TopTargets:
        """Returns the targets of a batch of the sequences that :meth:`check` accepted."""
        if batch.index is None or self._sequences is None:
            raise ValueError(
                "batch: got one without its sequences' indices, wanted a batch of sequences that `check` was called with"
            )
        ids = self._sequences.input_ids[batch.index]
        mask = self._sequences.text_mask(batch.index)[:, 1:].flatten()
        starts, counts = self._offsets[batch.index], self._offsets[batch.index + 1] - self._offsets[batch.index]
        skipped = starts - (counts.cumsum(0) - counts)
        positions = torch.arange(int(counts.sum())) + skipped.repeat_interleave(counts)
        device, shape = batch.input_ids.device, (len(ids), ids.shape[1] - 1)
        if self.kind == "topk":
            indices, logprobs = self._gather("indices", positions, mask, -1), self._gather("logprobs", positions, mask, 0)
            return TopTargets(_send(indices.view(*shape, -1), device), _send(logprobs.view(*shape, -1), device))
        hidden = _send(self._gather("hidden", positions, mask, 0).view(*shape, -1), device).to(self.head.weight.dtype)
        if device.type == "cpu":  # on a CPU the log-sum-exps save nothing, and would change the last bit
            return HiddenTargets(hidden, self.head)
        return HiddenTargets(hidden, self.head, _send(self._gather("lse", positions, mask, 0).view(shape), device))

    def _gather(self, name: str, positions: torch.Tensor, mask: torch.Tensor, blank: int) -> torch.Tensor:
        """Returns ``[len(mask), ...]``: the stored entries of ``positions`` where ``mask`` is set, ``blank`` elsewhere."""
        dtype = self._columns[name][0]
        first = self._shards[0].tensor(name, dtype)
        packed = torch.empty(len(positions), *first.shape[1:], dtype=dtype)
        home = torch.searchsorted(self._first, positions, right=True) - 1
        for index in home.unique().tolist():
            here, shard = home == index, self._shards[index]
            packed[here] = shard.tensor(name, dtype)[positions[here] - self._first[index]]
            shard.let_go(name)
        out = torch.full((len(mask), *first.shape[1:]), blank, dtype=dtype)
        out[mask] = packed
        return out


def _send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
